"""Opening, closing and forgetting a call."""

from __future__ import annotations

from torch import Tensor

from ..store import moments
from ..store.numbers import unpromote
from ..store.rollback import counts_at, shrink
from ..store.state import CacheState, Call
from . import capacity
from .prompt_pages import give_back
from .settle import settle_after, settle_before


def open_call(
    state: CacheState, lengths: tuple[int, ...], phase: str, valid: Tensor | None
) -> None:
    """Reserves tables and, for decoding, pages; then marks the call as open."""
    if phase == "decode":
        lengths = tuple(n if on else 0 for n, on in zip(lengths, state.active, strict=True))
    state.widen(max(a + b for a, b in zip(state.lengths, lengths, strict=True)))
    if phase == "decode" and moments.is_full(state, lengths):
        moments.settle(state)
    steps = max(lengths, default=0)
    if phase == "prompt":
        capacity.take(state, lengths)
    elif state.steps_reserved < steps:
        capacity.reserve(state, steps, max(steps, state.spec.interval))
    call = Call(phase=phase, added=lengths, valid=valid)
    if phase == "decode":
        settle_before(state, call)
    state.call = call


def close_call(state: CacheState, call: Call) -> None:
    """Makes lengths current on host and devices."""
    if call.phase == "prompt":
        state.devices.settle()
        give_back(state, call)
        for layer, found in call.chosen.items():
            store = state.layers[layer]
            store.chosen = found if store.chosen is None else store.chosen + found
    else:
        settle_after(state, call)
    state.call = None
    for row, added in zip(state.sequences, call.added, strict=True):
        if call.phase == "prompt" and added and not row.length:
            row.active = True  # a new sequence, maybe in a slot that had been emptied
        row.length += added
    if call.phase == "prompt" or call.columns > max(state.spec.rollback, 1):
        moments.committed(state, call.added)
    if call.phase == "prompt":
        state.sync_devices()
    else:
        state.steps_reserved -= max(call.added, default=0)
        state.devices.advance(call.valid)


def abort(state: CacheState) -> None:
    """Forgets the call in flight; the cache is as it was before `begin`."""
    call, state.call = state.call, None
    if call is None:
        return
    try:
        for layer in state.layers:
            if layer.index in call.undo:
                layer.restore(call.undo[layer.index])
            if call.phase == "decode":
                lengths = state.on(layer).lengths
                counts = counts_at(state, layer, lengths, max(call.added))
                if layer.index not in call.undo:
                    unpromote(state, layer, counts)
                shrink(state, layer, counts)
            elif layer.index in call.before:
                shrink(state, layer, call.before[layer.index])
    finally:
        if call.phase == "prompt":
            state.devices.release()
        state.devices.recount()  # pages that were taken and not yet put into a table
    if call.phase == "decode" and call.columns <= state.spec.rollback:
        # Rings of layers that ran hold the new tokens in the oldest slots of the rollback.
        for row, added in zip(state.sequences, call.added, strict=True):
            row.longest = max(row.longest, row.length + added)
    for row, longest in zip(state.sequences, call.longest or (), strict=False):
        row.longest = longest
    state.sync_devices()
    state.steps_reserved = 0
