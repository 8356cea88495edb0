"""Sequences of a cache as slots: filled, emptied and moved in place, beside others that go on.

A cache of N sequences is a room with N slots; a free one is a sequence that holds nothing and is
not active. Every buffer keeps its address, so captured steps stay valid, but where a sequence is
longer than the room's page tables: then they are widened first (`CacheState.widen` does so before
anything is captured).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import rows_below
from .._fields import check_int
from . import numbers
from .checks import check_idle, check_row, check_state
from .fork import select_rows
from .layer import LayerStore
from .sequence import SequenceState
from .state import CacheState


def side_state(state: CacheState, batch: int = 1) -> CacheState:
    """An empty cache of `batch` sequences that shares the pools, for prompts beside decoding.

    It has the policies, caps and what `CachePipeline.tell` told; `move` takes its sequences over.
    """
    check_state(state)
    check_int("batch", batch, 1)
    check_idle(state, "side_state")
    return select_rows(state, [-1] * batch)


def move(target: CacheState, slot: int, source: CacheState, row: int) -> None:
    """Makes sequence `row` of `source` sequence `slot` of `target`, which must be empty.

    Pages change their owner and are not copied, all else is; `row` becomes empty and inactive. What
    prompts' tiles of `source` read so far counts as read by `target` from now on. `source` may be
    `target`.

    Raises, with nothing changed:
        ValueError: the caches share no pools, the slot holds tokens, a number is out of range.
        PhaseError: a call is in flight.
    """
    for name, state in (("target", target), ("source", source)):
        check_state(state, name)
        check_idle(state, "move")
    check_row(target, "slot", slot)
    check_row(source, "row", row)
    if target.devices.pools != source.devices.pools:
        raise ValueError(
            "source: wanted a cache on the pages of target, such as side_state(target) or a fork, "
            "got one with pages of its own"
        )
    if target is source and slot == row:
        raise ValueError(f"slot: wanted another sequence than the one that moves, got {slot}")
    source.sync_host()
    check_empty(target, slot)
    moving = source.sequences[row]
    with target.unbroken():
        make_wide(target, moving.length, _stored(source, row))
        try:
            for mine, theirs in zip(target.layers, source.layers, strict=True):
                _copy(mine, slot, theirs, row)
            # From here on the sequence is the target's.
            target.sequences[slot], source.sequences[row] = moving, SequenceState(active=False)
            target.steps_reserved = 0
            wipe(source, [row])
            source.sync_devices()
            target.sync_devices()
        except BaseException:
            there = target.sequences[slot] is moving
            wipe(*((source, [row]) if there else (target, [slot])))
            source.sync_devices()
            target.sync_devices()
            raise


def clear(state: CacheState, rows: Tensor | Sequence[int]) -> None:
    """Empties sequences in place and makes them inactive; the others are not touched.

    Pages that nobody else holds become free; the pools keep their memory (`CacheState.trim` gives
    it back). Raises ValueError for a row that the cache does not have, PhaseError while a call is
    in flight, with nothing changed.
    """
    check_state(state)
    check_idle(state, "clear")
    gone = list(dict.fromkeys(rows_below("rows", rows, state.batch)))
    if not gone:
        return
    state.sync_host()
    with state.unbroken():
        held = {
            pool: torch.cat([x.table[gone].flatten() for x in state.layers if x.pool is pool])
            for pool in state.devices.pools
        }
        try:
            wipe(state, gone)
            for pool, ids in held.items():
                pool.release(ids)
            state.sync_devices()
        except BaseException:
            wipe(state, gone)
            state.sync_devices()
            raise


def check_empty(state: CacheState, slot: int) -> None:
    """Raises ValueError for a sequence that holds tokens; the host learns what the device knows."""
    state.sync_host()
    if state.sequences[slot].length:
        raise ValueError(
            f"slot: wanted an empty sequence, {slot} holds {state.sequences[slot].length} tokens; "
            "clear or park it first"
        )


def make_wide(state: CacheState, tokens: int, stored: int) -> None:
    """Room in page tables for a sequence of `tokens`, and for the numbers of `stored` a head."""
    state.widen(tokens)
    numbers.widen(state, stored)


def wipe(state: CacheState, rows: list[int]) -> None:
    """Empties sequences but for the devices' numbers; what their tables named is others' to count.

    Doing so twice is doing so once.
    """
    for layer in state.layers:
        index = torch.tensor(rows, device=layer.device)
        for tensor in (layer.table, layer.counts, layer.evicted, layer.ring.flags):
            tensor.index_fill_(0, index, 0)
        if layer.selected is not None:
            _writable(layer.selected, layer).index_fill_(0, index, -1)
    for row in rows:
        state.sequences[row] = SequenceState(active=False)


def _stored(state: CacheState, row: int) -> int:
    """Global tokens of a sequence's longest head, in layers that have numbers of them."""
    return numbers.most_of([x.counts[row] for x in state.layers if x.numbers is not None])


def _copy(mine: LayerStore, slot: int, theirs: LayerStore, row: int) -> None:
    """Writes a sequence's buffers to those of a slot that has room for them."""
    for name, into in mine.buffers.items():
        _put(into[slot], theirs.buffers[name][row])
    _put(mine.table[slot], theirs.table[row])
    if mine.selected is not None and theirs.selected is not None:
        _put(_writable(mine.selected, mine)[slot], theirs.selected[row])  # -1 in an empty slot
    if mine is theirs:
        return
    mine.sinks = mine.sinks if theirs.sinks is None else theirs.sinks
    if theirs.chosen is not None:
        mine.chosen = theirs.chosen if mine.chosen is None else mine.chosen + theirs.chosen
        theirs.chosen = None


def _put(into: Tensor, source: Tensor) -> None:
    """Copies what lies in both of two buffers, the second dimension of which may differ."""
    if into.shape != source.shape:
        width = min(into.shape[1], source.shape[1])
        into, source = into[:, :width], source[:, :width]
    into.copy_(source)


def _writable(selected: Tensor, layer: LayerStore) -> Tensor:
    """`selected` of a layer, which inference mode may have made."""
    if selected.is_inference():
        selected = layer.selected = selected.clone()
    return selected
