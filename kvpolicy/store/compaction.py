"""Dropping tokens for real: kept ones move together, pages are freed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import ADMITTED, MARKED, pages_of
from .layer import LayerStore
from .numbers import move_kept
from .pool import PagePool
from .state import CacheState
from .summaries import SCRATCH, summarize, summary_of


class Kept(NamedTuple):
    """What stays of a layer: `keep` `[B, Hkv, N]`, `counts` `[B, Hkv]` tokens."""

    layer: LayerStore
    keep: Tensor
    counts: Tensor


class Drop(NamedTuple):
    """A drop that is decided but not done, of the layers that share a pool.

    `keep` holds the layers' masks `[B, Hkv, N]` one after the other, of `widths` N; those of a head
    begin at `starts` `[L, B, Hkv]`. `counts` `[L, B, Hkv]` tokens are left. `table`
    `[L, B, Hkv, M]` are the pages up to now, and `own` marks those that kept tokens move into and
    that other heads hold too: they are replaced by `takes` new ones. `gone` are the tokens that go,
    by sequence. `refreshed` are, for each layer, the pages that change as places in its table
    `[3, n]`, and their new summaries `[n, S]`; where an op makes those after the drop, instead how
    many pages a head has at most then.
    """

    pool: PagePool
    layers: list[LayerStore]
    keep: Tensor
    starts: Tensor
    widths: list[int]
    counts: Tensor
    table: Tensor
    own: Tensor
    takes: int
    gone: list[int]
    refreshed: list[tuple[Tensor, Tensor] | int | None]


def plan(state: CacheState, keeps: Iterable[tuple[LayerStore, Tensor]]) -> list[Drop]:
    """What it takes to keep only the global tokens with `keep` `[B, Hkv, N]`; changes nothing.

    `keep` marks nothing beyond a head's tokens (`of_tokens`).
    Selections summarize here what their pages will hold: one that raises does so before any drop.
    """
    parts: dict[PagePool, list[Kept]] = {}
    for layer, keep in keeps:
        kept = Kept(layer, keep, keep.sum(-1, dtype=torch.int32))
        parts.setdefault(layer.pool, []).append(kept)
    if not parts:
        return []
    for pool in parts:
        pool.drain()  # what a cache held that is gone is not shared
    drafts = [_draft(pool, part) for pool, part in parts.items()]
    numbers = [
        torch.cat([x.own.sum()[None], _gone(x), x.counts.flatten(1).amax(1)]) for x in drafts
    ]
    host = iter(torch.cat([x.to(numbers[0].device) for x in numbers]).tolist())  # waits once
    drops = []
    for draft, part in zip(drafts, parts.values(), strict=True):
        takes, gone = next(host), list(islice(host, state.batch))
        refreshed = [_summaries(state, kept, next(host)) for kept in part]
        drops.append(draft._replace(takes=takes, gone=gone, refreshed=refreshed))
    return drops


def of_tokens(layer: LayerStore, keep: Tensor) -> Tensor:
    """`keep` `[B, Hkv, N]` without what lies beyond the tokens of heads."""
    return keep & (torch.arange(keep.shape[2], device=keep.device) < layer.counts[..., None])


def _draft(pool: PagePool, part: list[Kept]) -> Drop:
    """A drop of which the host knows no numbers yet."""
    layers, keeps = [x.layer for x in part], [x.keep for x in part]
    counts, device = torch.stack([x.counts for x in part]), pool.device
    table = torch.stack([x.table for x in layers])
    used = pages_of(counts, pool.page_size)[..., None]
    stays = torch.arange(table.shape[3], device=device) < used
    fewer = (counts < _counts(layers))[..., None]
    begin = [0, *accumulate(x.numel() for x in keeps)][:-1]
    sizes = torch.tensor([begin, [x.shape[2] for x in keeps]], device=device)[..., None]
    head = torch.arange(counts[0].numel(), device=device)
    return Drop(
        pool=pool,
        layers=layers,
        keep=torch.cat([x.flatten() for x in keeps]),
        starts=(sizes[0] + sizes[1] * head).view_as(counts),
        widths=[x.shape[2] for x in keeps],
        counts=counts,
        table=table,
        own=stays & fewer & (pool.refs[table.long()] > 1),
        takes=0,
        gone=[],
        refreshed=[],
    )


def drop(state: CacheState, drops: Sequence[Drop]) -> None:
    """Keeps planned tokens, closes the gaps in place and frees pages; `provide` comes before."""
    for planned in drops:
        if not any(planned.gone):
            continue
        pool, layers, counts, old = planned.pool, planned.layers, planned.counts, planned.table
        before = _counts(layers)
        changed = counts < before
        column = torch.arange(old.shape[3], device=old.device)
        beyond = column >= pages_of(counts, pool.page_size)[..., None]
        leaves = planned.own | (changed[..., None] & beyond)
        table = old.masked_fill(leaves, 0)
        if planned.takes:
            table.masked_scatter_(planned.own, pool.take(planned.takes))
        state.ops.move_kept(
            pool.pages, old.flatten(0, 2), table.flatten(0, 2), planned.keep,
            planned.starts.flatten(), before.masked_fill_(~changed, 0).flatten(),
        )  # fmt: skip
        heads = counts[0].numel()
        keeps = planned.keep.split([heads * width for width in planned.widths])
        for i, layer in enumerate(layers):
            move_kept(layer, keeps[i].view(*layer.counts.shape, -1), changed[i])
        gone = _counts(layers).sub_(counts).long()
        torch._foreach_copy_([x.table for x in layers], list(table.unbind()))
        torch._foreach_add_([x.evicted for x in layers], list(gone.unbind()))
        torch._foreach_copy_([x.counts for x in layers], list(counts.unbind()))
        for i, layer in enumerate(layers):
            found = planned.refreshed[i]
            if isinstance(found, int):
                summarize(state, layer, layer.counts.masked_fill(changed[i], 0), found)
            elif found is not None:
                state.ops.write_summary(pool.pages, layer.table[tuple(found[0])], found[1])
        pool.release(old.masked_fill_(~leaves, 0).flatten())


def _gone(planned: Drop) -> Tensor:
    """Tokens that go, by sequence `[B]`."""
    return (_counts(planned.layers) - planned.counts).sum((0, 2))


def _counts(layers: Sequence[LayerStore]) -> Tensor:
    """Global tokens `[L, B, Hkv]` of layers on one device."""
    return torch.stack([x.counts for x in layers])


def _sources(keep: Tensor, changed: Tensor, most: int) -> Tensor:
    """Which token becomes token i of a head that changes: `[B, Hkv, most]` int32, -1 for none."""
    place = keep.cumsum(-1).sub_(1)
    place.masked_fill_(~(keep & changed[..., None]), most)
    token = torch.arange(keep.shape[2], dtype=torch.int32, device=keep.device)
    source = token.new_full((*keep.shape[:2], most + 1), -1)
    return source.scatter_(-1, place, token.expand_as(place))[..., :most]


def _summaries(state: CacheState, kept: Kept, most: int) -> tuple[Tensor, Tensor] | int | None:
    """Places `[3, n]` and new summaries `[n, S]` of pages that change, from tokens as they lie.

    Only a policy's own: pages' smallest and largest keys cannot fail, and are found afterwards.
    `most` is the largest of the counts.
    """
    layer = kept.layer
    if layer.selection.neutral or layer.slides or not most:
        return None
    size = layer.pool.page_size
    if layer.selection.extends_minmax:
        return pages_of(most, size)
    source = _sources(kept.keep, kept.counts < layer.counts, most)
    source = F.pad(source, (0, -source.shape[2] % size), value=-1)
    page = layer.pool.kv_bytes + 4 * size
    step = max(SCRATCH // (source[..., 0].numel() * page), 1) * size  # tokens a head
    places, found = [], []
    for start in range(0, source.shape[2], step):
        chunk = source[..., start : start + step]
        keys = state.ops.read_tokens(layer.pool.pages, layer.table, chunk)[0]
        valid = (chunk >= 0).unflatten(2, (-1, size))
        at = valid.any(-1).nonzero(as_tuple=True)
        if at[0].numel():
            places.append(torch.stack([*at[:2], at[2] + start // size]))
            found.append(summary_of(layer, keys.unflatten(2, (-1, size))[at], valid[at]))
    return (torch.cat(places, 1), torch.cat(found)) if found else None


def forget_unmarked(layer: LayerStore, rows: Tensor) -> None:
    """Tokens in the window that were not marked leave for good when they leave the window."""
    flags = layer.ring.flags
    cleared = flags & ~ADMITTED & 0xFF
    drop_now = rows[:, None, None] & ((flags & MARKED) == 0)
    flags.copy_(torch.where(drop_now, cleared, flags))
