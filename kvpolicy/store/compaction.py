"""Dropping tokens for real: kept ones move together, pages are freed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ADMITTED, MARKED, POSITION_BITS, POSITION_MASK, EvictionView
from .dual_cache import _ceil, summary_of
from .pages import PagePool
from .state import CacheState, LayerStore

SCRATCH = 64 << 20  # bytes of keys and values that are on their way at once


def longest(layers: Sequence[LayerStore]) -> list[int]:
    """Most global tokens of a head in each layer; waits for the device once."""
    if not layers:
        return []
    device = layers[0].counts.device
    most: list[int] = torch.stack([x.counts.max().to(device) for x in layers]).tolist()
    return most


def held(layer: LayerStore, most: int, size: int) -> tuple[Tensor, Tensor]:
    """The table's columns in use and `valid` `[B, Hkv, N]`, the longest head having `most`."""
    used = -(-most // size)
    token = torch.arange(used * size, device=layer.counts.device)
    return layer.table[:, :, :used], token < layer.counts[..., None]


def view(state: CacheState, layer: LayerStore, most: int) -> EvictionView:
    """What an eviction sees of one layer, whose longest head holds `most` tokens."""
    device = layer.ring_k.device
    table, valid = held(layer, most, state.spec.page_size)
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

    @cache
    def content() -> tuple[Tensor, Tensor]:
        k, v, _ = state.ops.read_pages(layer.pool.pages, table)
        hide = ~valid[..., None]
        return k.flatten(2, 3).masked_fill_(hide, 0), v.flatten(2, 3).masked_fill_(hide, 0)

    @cache
    def meta() -> Tensor:
        return state.ops.read_meta(layer.pool.pages, table).flatten(2).masked_fill_(~valid, 0)

    return EvictionView(
        layer=layer.index,
        keys=lambda: content()[0],
        values=lambda: content()[1],
        positions=lambda: meta() & POSITION_MASK,
        valid=valid,
        marked=lambda: (meta() >> POSITION_BITS) & 1 > 0,
        recent_keys=layer.ring_k.gather(2, index).masked_fill((recent < 0)[:, None, :, None], 0),
        recent_valid=recent >= 0,
        lengths=lengths,
        scale=state.spec.softmax_scale,
        queries=queries,
        query_valid=query_valid,
    )


class Drop(NamedTuple):
    """A drop that is decided but not done: `keep` `[B, Hkv, N]`, `counts` `[B, Hkv]` afterwards.

    `most` is the largest count. `own` `[B, Hkv, M]` marks pages that kept tokens move into and that
    other heads hold too: they are replaced by `takes` new ones. `gone` are the tokens that go, by
    sequence. `refreshed` are the pages that change, as places in the table `[3, n]`, and `summary`
    `[n, S]` their new summaries.
    """

    layer: LayerStore
    keep: Tensor
    counts: Tensor
    own: Tensor
    most: int
    takes: int
    gone: list[int]
    refreshed: Tensor | None
    summary: Tensor | None


def plan(state: CacheState, keeps: Iterable[tuple[LayerStore, Tensor]]) -> list[Drop]:
    """What it takes to keep only the global tokens with `keep` `[B, Hkv, N]`; changes nothing.

    Selections summarize here what their pages will hold: one that raises does so before any drop.
    """
    drafts, numbers = [], []
    for layer, keep in keeps:
        keep = keep & (torch.arange(keep.shape[2], device=keep.device) < layer.counts[..., None])
        counts = keep.sum(-1, dtype=torch.int32)
        column = torch.arange(layer.table.shape[2], device=keep.device)
        stays = column < _ceil(counts, state.spec.page_size)[..., None]
        shared = layer.pool.refs[layer.table.long()] > 1
        own = stays & shared & (counts < layer.counts)[..., None]
        drafts.append((layer, keep, counts, own))
        gone = (layer.counts - counts).sum(1)
        numbers.append(torch.cat([counts.max()[None], own.sum()[None], gone]))
    if not drafts:
        return []
    host = torch.stack([x.to(numbers[0].device) for x in numbers]).tolist()  # waits once
    return [
        Drop(*draft, most, takes, gone, *_summaries(state, *draft[:3], most))
        for draft, (most, takes, *gone) in zip(drafts, host, strict=True)
    ]


def drop(state: CacheState, drops: Sequence[Drop]) -> None:
    """Keeps the planned tokens, closes the gaps in place and frees pages; `secure` comes before."""
    freed: dict[PagePool, list[Tensor]] = {}
    for planned in drops:
        layer, counts = planned.layer, planned.counts
        old, changed = layer.table.clone(), counts < layer.counts
        column = torch.arange(old.shape[2], device=old.device)
        beyond = column >= _ceil(counts, state.spec.page_size)[..., None]
        leaves = planned.own | (changed[..., None] & beyond)
        layer.table.masked_fill_(leaves, 0)
        if planned.takes:
            layer.table.masked_scatter_(planned.own, layer.pool.take(planned.takes))
        _move(state, planned, old, _sources(planned.keep, changed, planned.most))
        layer.evicted.add_(layer.counts - counts)
        layer.counts.copy_(counts)
        if planned.summary is not None and planned.refreshed is not None:
            ids = layer.table[tuple(planned.refreshed)]
            state.ops.write_summary(layer.pool.pages, ids, planned.summary)
        freed.setdefault(layer.pool, []).append(old.masked_fill_(~leaves, 0).flatten())
    for pool, tables in freed.items():
        pool.release(torch.cat(tables))


def _sources(keep: Tensor, changed: Tensor, most: int) -> Tensor:
    """Which token becomes token i of a head that changes: `[B, Hkv, most]` int32, -1 for none."""
    place = keep.cumsum(-1).sub_(1)
    place.masked_fill_(~(keep & changed[..., None]), most)
    token = torch.arange(keep.shape[2], dtype=torch.int32, device=keep.device)
    source = token.new_full((*keep.shape[:2], most + 1), -1)
    return source.scatter_(-1, place, token.expand_as(place))[..., :most]


def _step(layer: LayerStore, heads: int) -> int:
    """Tokens a head that are read at once, in whole pages."""
    size, dim = layer.pool.page_size, layer.pool.head_dim
    page = heads * size * (2 * dim * layer.ring_k.element_size() + 4)
    return max(SCRATCH // page, 1) * size


def _move(state: CacheState, planned: Drop, old: Tensor, source: Tensor) -> None:
    """Moves tokens to where the table says, reading through `old`, in rising order.

    A token never moves up. So what a chunk overwrites are tokens of this chunk, which have been
    read, or of earlier ones, which have moved; and no more than a chunk is ever copied.
    """
    layer = planned.layer
    heads, pages = source.shape[1], layer.pool.pages
    step = _step(layer, heads)
    for row, gone in enumerate(planned.gone):
        for start in range(0, planned.most if gone else 0, step):
            chunk = source[row : row + 1, :, start : start + step]
            k, v, meta = (x[0] for x in state.ops.read_tokens(pages, old[row : row + 1], chunk))
            at = torch.arange(start, start + chunk.shape[2], dtype=torch.int32, device=chunk.device)
            dest = torch.where(chunk[0] < 0, -1, at)
            state.ops.append(pages, layer.table, k, v, meta, dest, torch.full_like(at, row))


def _summaries(
    state: CacheState, layer: LayerStore, keep: Tensor, counts: Tensor, most: int
) -> tuple[Tensor | None, Tensor | None]:
    """Places `[3, n]` and new summaries `[n, S]` of pages that change, from tokens as they lie."""
    if layer.selection.neutral or layer.slides:
        return None, None
    size = state.spec.page_size
    source = _sources(keep, counts < layer.counts, most)
    source = torch.nn.functional.pad(source, (0, -most % size), value=-1)
    places, found = [], []
    step = _step(layer, source.shape[0] * source.shape[1])
    for start in range(0, source.shape[2], step):
        chunk = source[..., start : start + step]
        keys = state.ops.read_tokens(layer.pool.pages, layer.table, chunk)[0]
        valid = (chunk >= 0).unflatten(2, (-1, size))
        at = valid.any(-1).nonzero(as_tuple=True)
        if at[0].numel():
            places.append(torch.stack([*at[:2], at[2] + start // size]))
            found.append(summary_of(layer, keys.unflatten(2, (-1, size))[at], valid[at]))
    return (torch.cat(places, 1), torch.cat(found)) if found else (None, None)


def forget_unmarked(layer: LayerStore, rows: Tensor) -> None:
    """Tokens in the window that were not marked leave for good when they leave the window."""
    marked = (layer.ring_flags & MARKED) > 0
    cleared = layer.ring_flags & ~ADMITTED & 0xFF
    drop_now = rows[:, None, None] & ~marked
    layer.ring_flags.copy_(torch.where(drop_now, cleared, layer.ring_flags))
