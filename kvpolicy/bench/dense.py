"""Dense causal attention kernels to compare with."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .context import Bench
from .timing import median_ms

HEADS, KV_HEADS = 32, 8


def dense_calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Any]]:
    """Dense causal kernels on `[H, T, D]`: those that can be imported, by name."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    calls: dict[str, Callable[[], Any]] = {}
    try:
        flash = importlib.import_module("fa3_fwd_interface")
        calls["FA3"] = lambda: flash.flash_attn_func(q, k, v, causal=True)
    except ImportError:
        pass
    kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}
    for name, kind in kinds.items() if query.is_cuda else [("SDPA", SDPBackend.MATH)]:
        # Keys repeated beforehand: not every backend takes fewer KV heads.
        repeat = query.shape[0] // key.shape[0]
        wide = [x.repeat_interleave(repeat, 0)[None] for x in (key, value)]
        calls[name] = functools.partial(_sdpa, kind, query[None], *wide)
    return calls


def _sdpa(kind: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def dense_ms(bench: Bench, tokens: int, dim: int) -> dict[str, float]:
    """Times of the dense kernels at a length, measured once a run."""
    key = ("dense", tokens, dim)
    if key not in bench.shared:
        heads, kv_heads = bench.pick(HEADS, 4), bench.pick(KV_HEADS, 2)
        q = bench.randn(tokens, heads, dim).transpose(0, 1)
        k, v = (bench.randn(tokens, kv_heads, dim).transpose(0, 1) for _ in range(2))
        found = bench.shared[key] = {}
        for name, call in dense_calls(q, k, v).items():
            try:
                found[name] = median_ms([call], bench.device)
            except RuntimeError as error:  # a kernel that does not take these shapes
                bench.say(f"dense {name}: {str(error).splitlines()[0]}")
    return bench.shared[key]


def dense_flops(bench: Bench, tokens: int, dim: int) -> float:
    return 4.0 * dim * bench.pick(HEADS, 4) * tokens * (tokens + 1) / 2
