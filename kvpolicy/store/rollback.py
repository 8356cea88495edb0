"""Taking tokens back: crop of the last tokens, and what a call that is broken off had written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PhaseError, RollbackError
from ..ops import POSITION_MASK, pages_of
from .layer import LayerStore
from .numbers import unpromote
from .state import CacheState
from .summaries import refresh_summary


def crop(state: CacheState, tokens: Sequence[int]) -> None:
    """Takes back the last `tokens[b]` tokens of each sequence.

    Exact up to the store's rollback depth. Raises RollbackError, with nothing changed, for more, or
    if an eviction lies between; ValueError for what are no numbers of stored tokens.
    """
    if state.call is not None:
        raise PhaseError("crop: a call is in flight; commit or abort it first")
    if len(tokens) != state.batch:
        raise ValueError(f"tokens: wanted {state.batch} numbers, got {len(tokens)}")
    for place, (count, row) in enumerate(zip(tokens, state.sequences, strict=True)):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"tokens: wanted ints, got {count!r} for sequence {place}")
        if not 0 <= count <= row.length:
            raise ValueError(
                f"tokens: sequence {place} holds {row.length} tokens, cannot drop {count}"
            )
        if count and row.length - count < row.evicted_at:
            raise RollbackError(
                f"sequence {place}: an eviction at length {row.evicted_at} lies inside the last "
                f"{count} tokens; fork the cache before decoding to go back further"
            )
        # Rollback that went into earlier tokens.
        lost = max(row.length, row.longest) - row.length
        if count + lost > state.spec.rollback and 0 < count < row.length:
            raise RollbackError(
                f"sequence {place}: {count} tokens are more than rollback={state.spec.rollback}"
                f"{f' less {lost} since the longest length' if lost else ''}; make the cache "
                "with a larger rollback or fork it"
            )
    if not any(tokens):
        return
    state.devices.drain()  # what a cache held that is gone is not shared
    counts = {}
    for layer in state.layers:
        lengths = state.on(layer).lengths
        after = lengths - torch.tensor(tokens, device=lengths.device)
        counts[layer.index] = counts_at(state, layer, after, max(tokens))

    def copies(layer: LayerStore) -> int:
        left = counts[layer.index]
        return _shared_partial(layer, left, left < layer.counts)[0].numel()

    state.provide(state.devices.count(state.layers, copies))
    for count, row in zip(tokens, state.sequences, strict=True):
        row.longest = max(row.longest, row.length) if count < row.length else 0
        row.length -= count
        row.summed = min(row.summed, row.length)  # less only where all goes
        row.considered_at = min(row.considered_at, row.length)
    state.sync_devices()
    with state.unbroken():
        for layer in state.layers:
            unpromote(state, layer, counts[layer.index])
            shrink(state, layer, counts[layer.index])


def counts_at(state: CacheState, layer: LayerStore, lengths: Tensor, newest: int) -> Tensor:
    """Global tokens before the window of `lengths` `[B]`; at most `newest` a head are not."""
    if layer.slides:
        return layer.counts.clone()
    size = layer.pool.page_size
    span = min(pages_of(newest, size) + 1, layer.table.shape[2])
    held = pages_of(layer.counts, size)
    column = (held[..., None] - span + torch.arange(span, device=held.device)).clamp(min=0)
    ids = layer.table.gather(2, column.long())
    at = state.ops.read_pages(layer.pool.pages, ids)[2] & POSITION_MASK
    index = column[..., None] * size + torch.arange(size, device=held.device)
    # Clamped columns repeat page 0 of the head; count each column once.
    once = torch.ones_like(column, dtype=torch.bool)
    once[..., 1:] = column[..., 1:] != column[..., :-1]
    near = at >= lengths.view(-1, 1, 1, 1) - layer.window
    newer = (index < layer.counts[..., None, None]) & once[..., None] & near
    return layer.counts - newer.sum((-1, -2), dtype=torch.int32)


def shrink(state: CacheState, layer: LayerStore, counts: Tensor) -> None:
    """Cuts every head back to its first `counts` `[B, Hkv]` global tokens."""
    size = layer.pool.page_size
    want, have = pages_of(counts, size), pages_of(layer.counts, size)
    column = torch.arange(layer.table.shape[2], device=counts.device)
    gone = (column >= want[..., None]) & (column < have[..., None])
    shorter = (counts < layer.counts) & (counts % size > 0)
    layer.pool.release(layer.table[gone])
    # Beyond the counts lie pages of a write that was broken off before it was settled.
    layer.table.masked_fill_(column >= want[..., None], 0)
    layer.counts.copy_(counts)
    own_partial(state, layer, shorter)
    b, h = shorter.nonzero(as_tuple=True)
    if b.numel() and not layer.selection.neutral:
        ids = layer.table[b, h, (counts[b, h] // size).long()]
        refresh_summary(state, layer, ids, counts[b, h] % size)


def own_partial(state: CacheState, layer: LayerStore, heads: Tensor) -> None:
    """Gives `heads` (bool `[B, Hkv]`) a copy of their partial page where it is shared."""
    b, h, m, ids = _shared_partial(layer, layer.counts, heads)
    if b.numel():
        fresh = layer.pool.take(b.numel())
        state.ops.copy_pages(layer.pool.pages, ids, fresh)
        layer.table[b, h, m] = fresh
        layer.pool.release(ids)


def _shared_partial(layer: LayerStore, counts: Tensor, heads: Tensor) -> tuple[Tensor, ...]:
    """Sequence, head, column and id of the page where `heads` with `counts` `[B, Hkv]` tokens end.

    Only pages that are partly filled then and that other heads hold too.
    """
    size = layer.pool.page_size
    b, h = (heads & (counts % size > 0)).nonzero(as_tuple=True)
    m = (counts[b, h] // size).long()
    ids = layer.table[b, h, m]
    shared = layer.pool.refs[ids.long()] > 1
    return b[shared], h[shared], m[shared], ids[shared]
