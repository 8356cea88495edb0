"""Taking tokens back: abort of a call in flight, and crop of the last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PhaseError, RollbackError
from ..ops import POSITION_MASK
from .dual_cache import refresh_summary
from .layer import LayerStore
from .state import CacheState


def abort(state: CacheState) -> None:
    """Forgets the call in flight; the cache is as it was before `begin`."""
    call, state.call = state.call, None
    if call is None:
        return
    for layer in state.layers:
        for target, saved in zip(
            _undo_targets(layer), call.undo.get(layer.index, ()), strict=False
        ):
            target.copy_(saved)
        if call.phase == "decode":
            before = state.lengths_on[layer.ring_k.device]
            shrink(state, layer, _counts_at(state, layer, before, max(call.added)))
        elif layer.index in call.before:
            shrink(state, layer, call.before[layer.index])
    for pool in state.pools.values():
        pool.refs[pool.free[: pool.available].long()] = 0  # of such a write
    columns = 1 if call.valid is None else call.valid.shape[1]
    if (
        call.phase == "decode" and columns <= state.spec.rollback
    ):  # more columns: rings were restored
        # Rings of layers that ran hold the new tokens in the oldest slots of the rollback.
        ends = [n + t for n, t in zip(state.lengths, call.added, strict=True)]
        state.reached = [max(pair) for pair in zip(state.reached, ends, strict=True)]
    state.sync_devices()
    state.steps_reserved = 0


def _undo_targets(layer: LayerStore) -> list[Tensor]:
    ring = [layer.ring_k, layer.ring_v, layer.ring_flags]
    return ring if layer.queries is None else [*ring, layer.queries]


def crop(state: CacheState, tokens: list[int]) -> None:
    """Takes back the last `tokens[b]` tokens of each sequence.

    Exact up to the store's rollback depth. Raises RollbackError, with nothing changed, for more, or
    if an eviction lies between.
    """
    if state.call is not None:
        raise PhaseError("crop: a call is in flight; commit or abort it first")
    if len(tokens) != state.batch:
        raise ValueError(f"tokens: wanted {state.batch} numbers, got {len(tokens)}")
    for row, (count, length) in enumerate(zip(tokens, state.lengths, strict=True)):
        if count < 0 or count > length:
            raise ValueError(f"tokens: sequence {row} holds {length} tokens, cannot drop {count}")
        if count and length - count < state.floor[row]:
            raise RollbackError(
                f"sequence {row}: an eviction at length {state.floor[row]} lies inside the last "
                f"{count} tokens; fork the cache before decoding to go back further"
            )
        lost = max(length, state.reached[row]) - length  # rollback that went into earlier ones
        if count + lost > state.spec.rollback and 0 < count < length:
            raise RollbackError(
                f"sequence {row}: {count} tokens are more than rollback={state.spec.rollback}"
                f"{f' less {lost} since the longest length' if lost else ''}; make the cache "
                "with a larger rollback or fork it"
            )
    if not any(tokens):
        return
    counts, takes = [], dict.fromkeys(state.pools.values(), 0)
    for pool in takes:
        pool.drain()  # what a cache held that is gone is not shared
    for layer in state.layers:
        lengths = state.lengths_on[layer.ring_k.device]
        after = lengths - torch.tensor(tokens, device=lengths.device)
        counts.append(_counts_at(state, layer, after, max(tokens)))
        takes[layer.pool] += _shared_partial(layer, counts[-1], counts[-1] < layer.counts)[
            0
        ].numel()
    state.secure(takes)
    reached = [max(pair) for pair in zip(state.reached, state.lengths, strict=True)]
    state.lengths = [n - t for n, t in zip(state.lengths, tokens, strict=True)]
    state.reached = [r if n else 0 for r, n in zip(reached, state.lengths, strict=True)]
    state.checked = [min(pair) for pair in zip(state.checked, state.lengths, strict=True)]
    state.sync_devices()
    for layer, after in zip(state.layers, counts, strict=True):
        shrink(state, layer, after)


def _counts_at(state: CacheState, layer: LayerStore, lengths: Tensor, newest: int) -> Tensor:
    """Global tokens before the window of `lengths` `[B]`; at most `newest` a head are not."""
    if layer.slides:
        return layer.counts.clone()
    size = state.spec.page_size
    span = min(-(-newest // size) + 1, layer.table.shape[2])
    held = (layer.counts + size - 1) // size
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
    size = state.spec.page_size
    want = (counts + size - 1) // size
    have = (layer.counts + size - 1) // size
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
