"""Whole sequences: fork, reorder, add and drop."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ..errors import PhaseError
from .layer import LayerStore
from .rollback import own_partial
from .state import HOST, CacheState


def select_rows(state: CacheState, rows: Sequence[int]) -> CacheState:
    """A new state whose sequence i is a copy of sequence `rows[i]`; full pages are shared.

    Rings, tables, lengths and each head's partial page are copied. -1 stands for an empty sequence.
    """
    if state.call is not None:
        raise PhaseError("a call is in flight; commit or abort it first")
    for row in rows:
        if not -1 <= row < state.batch:
            raise ValueError(f"rows: wanted sequences below {state.batch} (or -1), got {row}")
    new = state.shell(len(rows))
    new.lengths = [state.lengths[r] if r >= 0 else 0 for r in rows]
    new.active = [state.active[r] if r >= 0 else True for r in rows]
    new.floor = [state.floor[r] if r >= 0 else 0 for r in rows]
    new.reached = [state.reached[r] if r >= 0 else 0 for r in rows]
    new.checked = [state.checked[r] if r >= 0 else 0 for r in rows]
    new.pending = [state.pending[r] if r >= 0 else False for r in rows]
    new.overshoot = [state.overshoot[r] if r >= 0 else 0 for r in rows]
    new.cap_evicted = [state.cap_evicted[r] if r >= 0 else 0 for r in rows]
    new.sync_devices()
    # The new state holds its tables before any page is taken, so that nothing can fail in between.
    for layer in state.layers:
        copied = attrs.evolve(layer, selected=None)
        index = torch.tensor([max(r, 0) for r in rows], device=layer.table.device)
        empty = torch.tensor([r < 0 for r in rows], device=layer.table.device)
        for name in ("ring_k", "ring_v", "ring_flags", "table", "counts", "evicted", "queries"):
            tensor = getattr(layer, name)
            if tensor is not None:
                setattr(copied, name, _rows(tensor, index, empty))
        copied.pool.share(copied.table.flatten())
        new.layers.append(copied)
    for layer in new.layers:
        own_partial(new, layer, layer.counts > 0)
    return new


def _rows(tensor: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    picked = tensor.index_select(0, index)
    return picked.masked_fill_(empty.view(-1, *[1] * (picked.ndim - 1)), 0)


def adopt(state: CacheState, other: CacheState) -> None:
    """Replaces the rows of `state` by those of `other`, a result of `select_rows`, in place.

    With equal batch sizes every buffer keeps its address, so captured graphs stay valid.
    """
    for mine, theirs in zip(state.layers, other.layers, strict=True):
        mine.pool.release(mine.table.flatten())
        if mine.table.shape == theirs.table.shape:
            for target, source in zip(_tensors(mine), _tensors(theirs), strict=True):
                target.copy_(source)
        else:
            for name in ("ring_k", "ring_v", "ring_flags", "table", "counts", "evicted", "queries"):
                setattr(mine, name, getattr(theirs, name))
            mine.pool.generation += 1
        mine.selected = None
    # The rows belong to `state` now: what is left of `other` must not give them back.
    other.layers = []
    for name in HOST:
        setattr(state, name, getattr(other, name))
    state.steps_reserved = 0
    for device, tensor in state.lengths_on.items():
        if tensor.shape != other.lengths_on[device].shape:
            state.lengths_on[device] = other.lengths_on[device]
            state.active_on[device] = other.active_on[device]
            state.cu_one[device] = other.cu_one[device]
    state.sync_devices()


def _tensors(layer: LayerStore) -> list[Tensor]:
    return [*layer.buffers, layer.table]
