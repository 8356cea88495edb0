"""Dropping tokens for real: kept ones move together, pages are freed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import ADMITTED, MARKED, POSITION_BITS, POSITION_MASK, EvictionView
from .dual_cache import _give_pages, summarize
from .state import CacheState, LayerStore


def view(state: CacheState, layer: LayerStore) -> EvictionView:
    """What an eviction sees of one layer."""
    size, device = state.spec.page_size, layer.ring_k.device
    used = -(-int(layer.counts.max()) // size)
    k, v, meta = state.ops.read_pages(layer.pool.pages, layer.table[:, :, :used])
    length = used * size
    token = torch.arange(length, device=device)
    valid = token < layer.counts[..., None]
    meta = meta.flatten(2)
    lengths = state.lengths_on[device]
    recent = torch.arange(-layer.window, 0, device=device) + lengths[:, None]  # [B, W]
    slot = recent % layer.ring_k.shape[2]
    index = slot[:, None, :, None].expand(-1, layer.ring_k.shape[1], -1, layer.ring_k.shape[3])
    queries = query_valid = None
    if layer.queries is not None:
        w = layer.eviction.queries
        at = torch.arange(-w, 0, device=device) + lengths[:, None]
        index_q = (at % layer.queries.shape[2])[:, None, :, None]
        queries = layer.queries.gather(2, index_q.expand(-1, layer.queries.shape[1], -1, layer.queries.shape[3]))
        query_valid = at >= 0
    hide = ~valid[..., None]
    return EvictionView(
        layer=layer.index,
        keys=k.flatten(2, 3).masked_fill(hide, 0),
        values=v.flatten(2, 3).masked_fill(hide, 0),
        positions=(meta & POSITION_MASK).masked_fill(~valid, 0),
        valid=valid,
        marked=((meta >> POSITION_BITS) & 1 > 0) & valid,
        recent_keys=layer.ring_k.gather(2, index).masked_fill((recent < 0)[:, None, :, None], 0),
        recent_valid=recent >= 0,
        lengths=lengths,
        scale=state.spec.softmax_scale,
        queries=queries,
        query_valid=query_valid,
    )


def drop(state: CacheState, layer: LayerStore, keep: Tensor) -> list[int]:
    """Keeps only the global tokens with `keep` `[B, Hkv, N]`; returns how many went, by sequence."""
    valid = torch.arange(keep.shape[2], device=keep.device) < layer.counts[..., None]
    keep = keep & valid
    after = keep.sum(-1, dtype=torch.int32)
    changed = after < layer.counts
    gone = layer.counts - after
    total: list[int] = gone.sum(1).tolist()
    if not any(total):
        return total
    old = layer.table.clone()
    before = torch.where(changed, 0, layer.counts)
    # Kept tokens go to pages of their own: the old ones may be shared with a fork.
    layer.table.masked_fill_(changed[..., None], 0)
    try:
        _give_pages(state, layer, before, torch.where(changed, after, layer.counts))
    except Exception:
        layer.table.copy_(old)
        raise
    dest = torch.where(keep & changed[..., None], keep.cumsum(-1, dtype=torch.int32) - 1, -1)
    state.ops.move(layer.pool.pages, old, layer.table, dest.int())
    layer.counts.copy_(torch.where(changed, after, layer.counts))
    layer.evicted.add_(gone)
    layer.pool.release(old[changed])
    summarize(state, layer, before, torch.where(changed, after, 0))
    return total


def forget_unmarked(layer: LayerStore, rows: Tensor) -> None:
    """Tokens in the window that were not marked leave for good when they leave the window."""
    marked = (layer.ring_flags & MARKED) > 0
    cleared = layer.ring_flags & ~ADMITTED & 0xFF
    drop_now = rows[:, None, None] & ~marked
    layer.ring_flags.copy_(torch.where(drop_now, cleared, layer.ring_flags))
