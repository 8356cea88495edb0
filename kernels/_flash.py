"""FlashAttention-3, where it is installed and the device is of Hopper's kind."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor

from . import _flash_vllm
from ._launch import capability

# Interfaces of FlashAttention-3 and the modules that say how they were built.
_MODULES = {"fa3_fwd_interface": "fa3_fwd_config", "flash_attn_interface": "flash_attn_config"}
_LARGEST = 256  # head_dim

Attend = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float],
    tuple[Tensor, Tensor],
]


def find_flash(query: Tensor, softcap: float | None = None) -> ModuleType | None:
    """The interface that takes these queries and caps logits if asked to, if there is one."""
    dim = query.shape[-1]
    if not query.is_cuda or capability(query.device) != 90 or dim % 8 or dim > _LARGEST:
        return None
    found = _installed()
    if found is None or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    module, left_out = found
    if softcap is not None and "SOFTCAP" in left_out:
        return None
    return None if query.dtype == torch.float16 and "FP16" in left_out else module


def find_varlen(query: Tensor, softcap: float | None = None) -> Attend | None:
    """`attend_varlen` of the interface that takes these queries, if there is one."""
    module, found = find_flash(query, softcap), _installed()
    if module is None or found is None or "VARLEN" in found[1]:
        return None
    return partial(attend_varlen, module, softcap=softcap)


def attend_varlen(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    used_q: Tensor,
    used_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention without a mask of sequences that lie anywhere in their tensors.

    Sequence b has the queries `cu_q[b] : cu_q[b] + used_q[b]` of `[N, G, D]` and the keys
    `cu_k[b] : cu_k[b] + used_k[b]` of `[M, 1, D]`; with used lengths given, the bounds are read as
    starts alone, in any order. Returns `[N, G, D]` and natural log-sum-exps `[G, N]` float32, both
    unset where no sequence has a query.
    """
    call = module.flash_attn_varlen_func
    # Packing heads of a group is for few queries.
    more: dict[str, bool | float] = {"return_attn_probs": True} if _asked_for(call) else {}
    if softcap is not None:
        more["softcap"] = softcap
    out, lse = call(
        query, key, value, cu_q, cu_k, longest_q, longest_k, seqused_q=used_q, seqused_k=used_k,
        softmax_scale=scale, causal=False, pack_gqa=False, **more,
    )  # fmt: skip
    return out, lse


@lru_cache
def _asked_for(call: Callable[..., object]) -> bool:
    """Whether the log-sum-exp has to be asked for; older interfaces return it unasked."""
    return "return_attn_probs" in inspect.signature(call).parameters


@lru_cache
def _installed() -> tuple[ModuleType, frozenset[str]] | None:
    """The interface, and the names of what its build left out."""
    for name, config in _MODULES.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        try:
            flags = importlib.import_module(config).CONFIG["build_flags"]
        except (ImportError, AttributeError, KeyError):
            return module, frozenset({"FP16", "SOFTCAP"})  # unknown: what every build takes
        prefix = "FLASHATTENTION_DISABLE_"
        left_out = (flag.removeprefix(prefix) for flag, off in flags.items() if off)
        return module, frozenset(left_out)
    if _flash_vllm.present():
        return _flash_vllm, frozenset({"FP16", "SOFTCAP"})
    return None
