"""Bytes of what a cache holds beside its pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from torch import Tensor

from ...backend import resolve
from ...pipeline import CachePipeline
from ...spec import CacheSpec
from ...store.pages import SLAB_PAGES
from ...store.state import _bucket


def ring_of(spec: CacheSpec, windows: list[int]) -> int:
    """Rings of a sequence whose layers have these windows."""
    slot = 2 * spec.head_dim * spec.dtype.itemsize + 1  # keys, values and a byte of flags
    return sum(w + spec.rollback for w in windows) * spec.kv_heads * slot


def queries_of(pipeline: CachePipeline, spec: CacheSpec, managed: list[int]) -> int:
    """Observed queries of a sequence in the layers that policies manage."""
    wanted = [pipeline.eviction.at(n).queries for n in managed]
    slots = sum(n + spec.rollback for n in wanted if n)
    return slots * spec.heads * spec.head_dim * spec.dtype.itemsize


def tables_of(
    pipeline: CachePipeline, spec: CacheSpec, tokens: int, batch: int, capacity: int
) -> int:
    """Page tables, counts, evicted, lengths; the pool's free stack, counts of holders and slabs."""
    rows = batch * spec.kv_heads
    width = _bucket(-(-tokens // spec.page_size))
    widths = [width if spec.slides(n) is None else 1 for n in range(spec.layers)]
    per_head = rows * sum(4 * w + 4 + 8 for w in widths)
    per_sequence = batch * (8 + 1) + 4 * (batch + 1)
    if resolve(pipeline.backend, spec.device) == "reference":
        return per_head + per_sequence + 8 * capacity
    # Kernels want a free stack and a slab table that never move: they are as long as the tables.
    longest = max(rows * sum(w for w in widths if w > 1) + SLAB_PAGES, capacity)
    return per_head + per_sequence + 8 * longest + 32 * (longest // SLAB_PAGES + 1)


def tensors_of(policy: Any) -> Iterator[Tensor]:
    """Every tensor inside a policy, through combinators and per-layer maps."""
    if isinstance(policy, Tensor):
        yield policy
    elif isinstance(policy, tuple):
        for member in policy:
            yield from tensors_of(member)
    elif attrs.has(type(policy)):
        for field in attrs.fields(type(policy)):
            yield from tensors_of(getattr(policy, field.name))
