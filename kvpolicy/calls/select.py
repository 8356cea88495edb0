"""Choosing the pages that a decoded token reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..selection import combine_group
from ..store.layer import LayerStore
from ..store.state import CacheState


def select(state: CacheState, layer: LayerStore, query: Tensor) -> Tensor | None:
    """The pages `[B, Hs, K]` that queries `[B, Hq, D]` read, or None for all."""
    policy = layer.selection
    if policy.neutral or layer.slides:
        return None
    size, pages = layer.pool.page_size, layer.pool.pages
    budget = min(policy.pages(layer.window, size), layer.table.shape[2])
    if policy.fused is not None:
        return getattr(state.ops, policy.fused)(
            pages, layer.heads, query, budget, policy.group, policy.first, policy.last
        )
    batch, heads, width = layer.table.shape
    column = torch.arange(width, device=query.device)
    held = (layer.counts[..., None] - column * size).clamp(0, size)
    summary = state.ops.read_summary(pages, layer.table)
    grouped = query.view(batch, heads, -1, query.shape[-1])
    scores = policy.score(grouped, summary, held)
    wanted = (batch, heads, grouped.shape[2], width)
    if scores.shape != wanted:
        raise ValueError(
            f"{type(policy).__name__}.score: wanted {list(wanted)}, got {list(scores.shape)}"
        )
    scores = combine_group(scores, policy.group)
    return state.ops.top_pages(scores, layer.counts, size, budget, policy.first, policy.last)
