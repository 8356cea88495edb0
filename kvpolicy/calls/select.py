"""Choosing the pages that a decoded token reads."""

from __future__ import annotations

from torch import Tensor

from ..store.layer import LayerStore
from ..store.state import CacheState


def select(state: CacheState, layer: LayerStore, query: Tensor) -> Tensor | None:
    """The pages `[B, Hs, K]` that queries `[B, Hq, D]` read, or None for all."""
    policy, pool = layer.selection, layer.pool
    if policy.neutral or layer.slides:
        return None
    budget = min(policy.pages(layer.window, pool.page_size), layer.table.shape[2])
    return policy.select(state.ops, pool.pages, layer.heads, query, budget)
