"""Dropping tokens for real: kept ones move together, pages are freed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ADMITTED, MARKED, POSITION_BITS, POSITION_MASK, EvictionView
from .dual_cache import _ceil, summarize
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
        queries = layer.queries.gather(
            2, index_q.expand(-1, layer.queries.shape[1], -1, layer.queries.shape[3])
        )
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


class Drop(NamedTuple):
    """A drop that is decided but not done: `keep` `[B, Hkv, N]`, `counts` `[B, Hkv]` afterwards.

    `own` `[B, Hkv, M]` marks pages that kept tokens move into and that other heads hold too: they
    are replaced by `takes` new ones. `gone` are the tokens that go, by sequence.
    """

    layer: LayerStore
    keep: Tensor
    counts: Tensor
    own: Tensor
    takes: int
    gone: list[int]


def plan(state: CacheState, layer: LayerStore, keep: Tensor) -> Drop:
    """What it takes to keep only the global tokens with `keep` `[B, Hkv, N]`; changes nothing."""
    keep = keep & (torch.arange(keep.shape[2], device=keep.device) < layer.counts[..., None])
    counts = keep.sum(-1, dtype=torch.int32)
    column = torch.arange(layer.table.shape[2], device=keep.device)
    stays = column < _ceil(counts, state.spec.page_size)[..., None]
    shared = layer.pool.refs[layer.table.long()] > 1
    own = stays & shared & (counts < layer.counts)[..., None]
    gone: list[int] = (layer.counts - counts).sum(1).tolist()
    return Drop(layer, keep, counts, own, int(own.sum()), gone)


def drop(state: CacheState, planned: Drop) -> None:
    """Keeps the planned tokens, closes the gaps in place and frees pages; `secure` comes before."""
    layer, keep, counts = planned.layer, planned.keep, planned.counts
    size, old, device = state.spec.page_size, layer.table.clone(), keep.device
    changed = counts < layer.counts
    column = torch.arange(old.shape[2], device=device)
    leaves = planned.own | (changed[..., None] & (column >= _ceil(counts, size)[..., None]))
    layer.table.masked_fill_(leaves, 0)
    if planned.takes:
        layer.table[planned.own] = layer.pool.take(planned.takes)
    dest = torch.where(keep & changed[..., None], keep.cumsum(-1, dtype=torch.int32) - 1, -1).int()
    for row, gone in enumerate(planned.gone):
        if not gone:
            continue
        # Read before written: tokens move to lower places, partly within the same pages.
        used = old[row, :, : keep.shape[2] // size]
        k, v, meta = (x.flatten(1, 2) for x in state.ops.read_pages(layer.pool.pages, used))
        rows = torch.full((k.shape[1],), row, dtype=torch.int32, device=device)
        state.ops.append(layer.pool.pages, layer.table, k, v, meta, dest[row], rows)
    layer.evicted.add_(layer.counts - counts)
    layer.counts.copy_(counts)
    layer.pool.release(old[leaves])
    summarize(state, layer, torch.zeros_like(counts), torch.where(changed, counts, 0))


def forget_unmarked(layer: LayerStore, rows: Tensor) -> None:
    """Tokens in the window that were not marked leave for good when they leave the window."""
    marked = (layer.ring_flags & MARKED) > 0
    cleared = layer.ring_flags & ~ADMITTED & 0xFF
    drop_now = rows[:, None, None] & ~marked
    layer.ring_flags.copy_(torch.where(drop_now, cleared, layer.ring_flags))
