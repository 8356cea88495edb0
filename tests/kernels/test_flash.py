"""FlashAttention-3 is found where it can be used, and called by the names of its arguments."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvpolicy.kernels import _flash


def interface(asks: bool, calls: list[dict[str, Any]]) -> ModuleType:
    """A module with the signature of the interface's function, newer or older."""

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        calls.append(locals())
        return ("out", "lse") if return_attn_probs or not asks else "out"

    if not asks:
        whole = inspect.signature(flash_attn_varlen_func)
        kept = [p for name, p in whole.parameters.items() if name != "return_attn_probs"]
        flash_attn_varlen_func.__signature__ = whole.replace(  # type: ignore[attr-defined]
            parameters=kept
        )
    module = ModuleType("interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("asks", [True, False])
def test_the_interface_is_called_by_its_names(asks: bool) -> None:
    calls: list[dict[str, Any]] = []
    names = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
             "max_seqlen_q", "max_seqlen_k", "softmax_scale"]  # fmt: skip
    got = _flash.attend_varlen(interface(asks, calls), *names)  # type: ignore[arg-type]
    assert got == ("out", "lse")
    call = calls[0]
    assert [call[name] for name in names] == names
    assert call["return_attn_probs"] is asks
    assert call["causal"] is False and call["pack_gqa"] is False and call["softcap"] == 0.0
    _flash.attend_varlen(interface(asks, calls), *names, 30.0)  # type: ignore[arg-type]
    assert calls[1]["softcap"] == 30.0


@pytest.mark.parametrize(
    ("cc", "dtype", "dim", "found"),
    [
        (90, torch.bfloat16, 128, True),
        (90, torch.float16, 128, False),  # left out of this build
        (90, torch.float32, 128, False),
        (90, torch.bfloat16, 100, False),
        (90, torch.bfloat16, 512, False),
        (100, torch.bfloat16, 128, False),
    ],
)
def test_where_the_interface_is_used(
    cc: int, dtype: torch.dtype, dim: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = interface(True, [])
    monkeypatch.setattr(_flash, "_installed", lambda: (module, frozenset({"FP16"})))
    monkeypatch.setattr(_flash, "capability", lambda device: cc)
    query: Any = SimpleNamespace(is_cuda=True, device=None, dtype=dtype, shape=(4, 9, dim))
    assert (_flash.find_flash(query) is module) is found
    assert (_flash.find_varlen(query) is not None) is found
    monkeypatch.setattr(_flash, "_installed", lambda: (module, frozenset({"VARLEN"})))
    assert _flash.find_varlen(query) is None
    monkeypatch.setattr(_flash, "_installed", lambda: (module, frozenset({"FP16", "SOFTCAP"})))
    assert (_flash.find_varlen(query) is not None) is found
    assert _flash.find_varlen(query, 30.0) is None
    query.is_cuda = False
    assert _flash.find_flash(query) is None


def test_what_a_build_left_out_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_VARLEN": False}
    config = ModuleType("fa3_fwd_config")
    config.CONFIG = {"build_flags": flags}  # type: ignore[attr-defined]
    module = interface(True, [])
    for name, value in (("fa3_fwd_interface", module), ("fa3_fwd_config", config)):
        monkeypatch.setitem(sys.modules, name, value)
    assert _flash._installed.__wrapped__() == (module, frozenset({"FP16"}))
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", None)
    assert _flash._installed.__wrapped__() == (module, frozenset({"FP16", "SOFTCAP"}))
    for name in _flash._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    assert _flash._installed.__wrapped__() is None
