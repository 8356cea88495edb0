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


# As the library that vLLM 0.26.0 ships registers it.
FWD = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q,
Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx,
Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary,
Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool is_causal,
int window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved,
Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""


def test_the_interface_of_vllm_is_called_by_the_places_of_its_op(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in _flash._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    names = [part.split("=")[0].split()[-1] for part in FWD[4 : FWD.rindex(")")].split(",")]
    calls: list[dict[str, Any]] = []

    def fwd(*given: Any) -> list[torch.Tensor]:
        calls.append(dict(zip(names, given, strict=True)))
        return [given[0] + 1, given[0] + 2, given[0], given[0]]

    with torch.library._scoped_library("_vllm_fa3_C", "DEF") as library:
        library.define(FWD)
        library.impl("fwd", fwd, "CPU")
        module, left_out = _flash._installed.__wrapped__()  # type: ignore[misc]
        assert left_out == {"FP16", "SOFTCAP"}
        q = torch.arange(3.0)
        k, v = q + 10, q + 20
        cu = [q.int() + n for n in range(4)]
        out, lse = _flash.attend_varlen(module, q, k, v, *cu, 5, 6, 0.25)
        assert torch.equal(out, q + 1) and torch.equal(lse, q + 2)
        dense = module.flash_attn_func(q, k, v, softmax_scale=0.5, causal=True)
        assert torch.equal(dense, q + 1)
    packed, whole = calls
    wanted = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "seqused_q": cu[2],
        "seqused_k": cu[3],
    }  # fmt: skip
    for name, given in packed.items():
        if name in wanted:
            torch.testing.assert_close(given, wanted[name], rtol=0, atol=0)
    rest = {name: given for name, given in packed.items() if name not in wanted}
    said = {
        "max_seqlen_q": 5, "max_seqlen_k": 6, "softmax_scale": 0.25, "is_causal": False,
        "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "num_splits": 1,
        "is_rotary_interleaved": True, "pack_gqa": False, "sm_margin": 0, "cp_world_size": 1,
        "cp_rank": 0,
    }  # fmt: skip
    assert {name: given for name, given in rest.items() if given is not None} == said
    assert whole["is_causal"] is True and whole["cu_seqlens_q"] is None
