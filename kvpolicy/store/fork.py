"""Whole sequences: fork, reorder, add and drop."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ..errors import PhaseError
from .rollback import own_partial
from .sequence import SequenceState
from .state import CacheState


def select_rows(state: CacheState, rows: Sequence[int]) -> CacheState:
    """A new state whose sequence i is a copy of sequence `rows[i]`; full pages are shared.

    Rings, tables, lengths and each head's partial page are copied. -1 stands for an empty sequence.
    Raises ValueError for a row that the cache does not have and for no rows at all, PhaseError
    while a call is in flight.
    """
    if state.call is not None:
        raise PhaseError("a call is in flight; commit or abort it first")
    if not rows:
        raise ValueError("rows: wanted at least one sequence (-1 for an empty one), got none")
    for row in rows:
        if not isinstance(row, int) or isinstance(row, bool) or not -1 <= row < state.batch:
            raise ValueError(f"rows: wanted sequences below {state.batch} (or -1), got {row!r}")
    new = state.shell(len(rows))
    new.sequences = [
        attrs.evolve(state.sequences[row]) if row >= 0 else SequenceState() for row in rows
    ]
    new.sync_devices()
    with state.unbroken():
        try:
            _fill(new, state, rows)
        except BaseException:
            new.devices.clear()
            raise
    return new


def _fill(new: CacheState, state: CacheState, rows: Sequence[int]) -> None:
    """Gives `new` the layers of `state` with sequences `rows`."""
    for layer in state.layers:
        index = torch.tensor([max(r, 0) for r in rows], device=layer.device)
        empty = torch.tensor([r < 0 for r in rows], device=layer.device)
        copied = attrs.evolve(layer, selected=None, chosen=None)
        copied.take_buffers(
            _pick(layer.table, index, empty),
            {name: _pick(t, index, empty) for name, t in layer.buffers.items()},
        )
        # The new state holds the table before a page is taken or counted.
        new.add_layer(copied)
        copied.pool.share(copied.table.flatten())
    for layer in new.layers:
        own_partial(new, layer, layer.counts > 0)


def _pick(tensor: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    picked = tensor.index_select(0, index)
    return picked.masked_fill_(empty.view(-1, *[1] * (picked.ndim - 1)), 0)


def adopt(state: CacheState, other: CacheState) -> None:
    """Replaces the rows of `state` by those of `other`, a result of `select_rows`, in place.

    With equal batch sizes every buffer keeps its address, so captured graphs stay valid.
    """
    with state.unbroken():
        # The rows belong to `state` now: what is left of `other` must not give them back.
        other.devices.clear()
        for pool in state.devices.pools:  # all layers together: a release waits for the device
            gone = [x.table.flatten() for x in state.layers if x.pool is pool]
            pool.release(torch.cat(gone))
        for mine, theirs in zip(state.layers, other.layers, strict=True):
            pairs = zip(mine.buffers.values(), theirs.buffers.values(), strict=True)
            same = all(a.shape == b.shape for a, b in pairs)
            if same and mine.table.shape == theirs.table.shape:
                mine.table.copy_(theirs.table)
                for name, target in mine.buffers.items():
                    target.copy_(theirs.buffers[name])
            else:
                mine.take_buffers(theirs.table, theirs.buffers)
                state.moved()
            mine.selected = mine.chosen = None
    state.sequences, state.steps_reserved = other.sequences, 0
    state.devices.adopt(other.devices)
    state.sync_devices()
