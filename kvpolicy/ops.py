"""Functional ops on plain tensors, for users who bring their own cache.

Each runs the reference on CPU tensors and the Triton kernel on CUDA tensors; the modules of
`kvpolicy.reference` document arguments and results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backend import ops, resolve


def _dispatch(name: str, probe: Tensor, *args: Any, **kwargs: Any) -> Any:
    return getattr(ops(resolve("auto", probe.device)), name)(*args, **kwargs)


def write_gate(key_pre: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Gate scores or decisions `[Hkv, T]`; see `kvpolicy.reference.write_gate`."""
    return _dispatch("write_gate", key, key_pre, key, *args, **kwargs)


def prefill_attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Admission-sparse attention `[Hq, T, D]`; see `kvpolicy.reference.sparse_prefill`."""
    return _dispatch("prefill_attention", query, query, *args, **kwargs)


def paged_decode(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Ragged paged attention `[B, Hq, D]`; see `kvpolicy.reference.paged_decode`."""
    return _dispatch("paged_decode", query, query, *args, **kwargs)
