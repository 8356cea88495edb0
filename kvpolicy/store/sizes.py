"""Bytes of what a cache holds, of a real one and of one planned on the "meta" device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .state import CacheState


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind tensors."""
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def ring_bytes(state: CacheState) -> int:
    """The local windows with their rollback slots."""
    return sum(storage_bytes(layer.ring) for layer in state.layers)


def query_bytes(state: CacheState) -> int:
    """The observation windows of evictions."""
    return storage_bytes(layer.queries for layer in state.layers)


def number_bytes(state: CacheState) -> int:
    """The numbers of tokens that evictions asked for."""
    return sum(storage_bytes(layer.numbers or ()) for layer in state.layers)


def statistics_bytes(state: CacheState) -> int:
    """Sums over queries and rings of queries before RoPE and attention inputs."""
    held = ((x.query_ring, x.query_sums, x.query_products, x.hidden) for x in state.layers)
    return sum(map(storage_bytes, held))


def table_bytes(state: CacheState) -> int:
    """Page tables, counters, lengths and flags; the pools' free stacks and reference counts."""
    layers = ((x.table, x.counts, x.evicted, x.selected, x.chosen) for x in state.layers)
    pools = ((x.free, x.refs, x.top, x.slabs) for x in state.devices.pools)
    return state.devices.nbytes + sum(storage_bytes(x) for x in (*layers, *pools))


def dense_bytes(state: CacheState) -> int:
    """Keys and values of all tokens seen, those of the window in layers that slide."""
    total = 0
    for layer in state.layers:
        tokens = sum(min(n, layer.window) if layer.slides else n for n in state.lengths)
        sizes = layer.sizes
        total += tokens * sizes.kv_heads * (sizes.head_dim + sizes.value_dim)
    return total * state.spec.dtype.itemsize
