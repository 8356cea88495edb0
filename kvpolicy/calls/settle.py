"""Accumulated numbers: queries that can no longer be taken back add their weights, once.

A query waits in its layer's ring until it lies `rollback` tokens back, so that `crop` and refused
candidates leave no trace; the ring still has every key that it saw then. An eviction looks at
copies to which those that wait have been added; one that drops tokens settles them for good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Heads, Numbers, Ring, Segments
from ..store.layer import LayerStore
from ..store.looked_back import looks_back
from ..store.numbers import counts_queries, keep_recent
from ..store.state import CacheState, Call


def settle(state: CacheState, upto: Sequence[int]) -> None:
    """Queries before positions `upto[b]` add their weights for good; the host says that they did.

    `upto` is at most a sequence's length. Changes nothing where no layer counts queries.
    """
    layers = [layer for layer in state.layers if counts_queries(layer)]
    if not layers:
        return
    begin = [row.final(state.spec.rollback) for row in state.sequences]
    for layer in layers:
        first, last = (torch.tensor(x, device=layer.device) for x in (begin, list(upto)))
        _waiting(state, layer, layer.numbers, first, last)


def seen(state: CacheState, layer: LayerStore) -> Numbers:
    """Copies of a layer's numbers to which every query so far has added its weights."""
    assert layer.numbers is not None
    numbers = Numbers(*(x.clone() for x in layer.numbers))
    if counts_queries(layer):
        begin = [row.final(state.spec.rollback) for row in state.sequences]
        first = torch.tensor(begin, device=layer.device)
        _waiting(state, layer, numbers, first, state.on(layer).lengths)
    return numbers


def _waiting(
    state: CacheState, layer: LayerStore, numbers: Numbers | None, first: Tensor, last: Tensor
) -> None:
    """Adds the weights of queries that wait, at positions from `first` to before `last` `[B]`."""
    if state.spec.rollback:
        lengths = state.on(layer).lengths
        _add(state, layer, numbers, lengths, first, last, state.spec.rollback)


def _add(
    state: CacheState, layer: LayerStore, numbers: Numbers | None, lengths: Tensor, first: Tensor,
    last: Tensor, most: int,
) -> None:  # fmt: skip
    assert layer.queries is not None and numbers is not None
    sizes = layer.sizes
    state.ops.attention_mass(
        numbers, layer.pool.pages, layer.heads, layer.ring, layer.queries, lengths, first, last,
        layer.window, sizes.scale, most=most, accumulates=str(layer.eviction.accumulates),
        group=layer.eviction.group, softcap=sizes.softcap, sinks=layer.sinks, chunk=sizes.chunk,
    )  # fmt: skip


def settle_step(state: CacheState, layer: LayerStore, lengths: Tensor, active: Tensor) -> None:
    """After a token at position `lengths` `[B]` was written where `active`: the query that from
    now on cannot be taken back. On the device alone, so that a graph can hold it."""
    _add(state, layer, layer.numbers, *_due(state, layer, lengths, active), 1)


def _due(
    state: CacheState, layer: LayerStore, lengths: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths with the new token, and the first and last query that it puts out of reach."""
    at = lengths - state.spec.rollback
    first = torch.maximum(at, state.on(layer).final)
    return lengths + 1, first, torch.where(active, at + 1, 0)


def settle_before(state: CacheState, call: Call) -> None:
    """Before a decode call of several columns: what it will put out of reach of `crop`.

    Its columns overwrite keys that these queries saw. A call of no more columns than can be taken
    back leaves its tokens in the rings even if it is given up, a wider one puts all of them back.
    """
    rollback, layers = state.spec.rollback, [x for x in state.layers if counts_queries(x)]
    if call.columns == 1 or not layers:
        return
    if call.columns > rollback:
        call.undo |= {layer.index: layer.snapshot() for layer in layers}
        call.longest = [row.longest for row in state.sequences]
    new = [min(added, rollback) for added in call.added]
    settle(state, [row.length + n - rollback for row, n in zip(state.sequences, new, strict=True)])
    for row, n in zip(state.sequences, new, strict=True):
        row.longest = max(row.longest, row.length + n)
    state.devices.write_final(state.sequences, rollback)


def settle_after(state: CacheState, call: Call) -> None:
    """After a decode call of one column, before its token is counted."""
    if call.columns > 1:
        return
    due: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
    for layer in state.layers:
        if not counts_queries(layer):
            continue
        if layer.device not in due:
            own = state.on(layer)
            active = own.active
            if call.valid is not None:
                active = active & call.valid[:, 0].to(layer.device)
            due[layer.device] = _due(state, layer, own.lengths, active)
        _add(state, layer, layer.numbers, *due[layer.device], 1)


def settle_ring(state: CacheState, call: Call, layer: LayerStore) -> None:
    """Before a layer of a prompt call writes: the waiting queries that it puts out of reach."""
    if not counts_queries(layer) or not any(state.lengths):
        return
    if layer.device not in call.numbers:
        upto = [
            min(row.length, row.length + added - state.spec.rollback) if added else 0
            for row, added in zip(state.sequences, call.added, strict=True)
        ]
        begin = [row.final(state.spec.rollback) for row in state.sequences]
        call.numbers[layer.device] = torch.tensor([begin, upto], device=layer.device)
    _waiting(state, layer, layer.numbers, *call.numbers[layer.device])


def settle_prompt(
    state: CacheState, call: Call, layer: LayerStore, seg: Segments, recent: Ring, query: Tensor,
    numbers: Tensor,
) -> None:  # fmt: skip
    """After a layer of a prompt call wrote: its own queries, but for those that wait.

    `recent` are the recent tokens of `seg` (`k` `[Hkv, Tk, D]`, `flags` `[Hkv, Tk]`), `query`
    `[Hq, T, D]`, `numbers` `[Hkv, Tk]` those of the recent tokens, which go to the ring.
    """
    assert layer.numbers is not None
    counts = looks_back(layer) if state.looks_back else counts_queries(layer)
    if counts:
        for row, start in enumerate(seg.start):
            _one_prompt(state, layer, seg, recent, query, numbers, row, start)
    keep_recent(layer, numbers, seg, call.shared)


def _one_prompt(
    state: CacheState, layer: LayerStore, seg: Segments, recent: Ring, query: Tensor,
    numbers: Tensor, row: int, start: int,
) -> None:  # fmt: skip
    """The queries of one sequence."""
    assert layer.numbers is not None
    q, k = (slice(x[row], x[row + 1]) for x in (seg.cu_q, seg.cu_k))
    end, own, sizes = start + q.stop - q.start, slice(row, row + 1), layer.sizes
    final = max(state.sequences[row].final(state.spec.rollback), start)
    first, last, among = final, end - state.spec.rollback, None
    if state.looks_back is not None:
        sinks, low, high, after = state.looks_back
        first, last, among = start, end, (sinks, low, high, after[row])
    if first >= last:
        return
    at = torch.tensor([end, first, last], device=layer.device)[:, None]
    state.ops.attention_mass(
        Numbers(layer.numbers.stored[own], numbers[None, :, k]), layer.pool.pages,
        Heads(layer.table[own], layer.counts[own]),
        Ring(*(x[None, :, k] for x in recent)), query[None, :, q], at[0], at[1], at[2],
        layer.window, sizes.scale, most=last - first, accumulates=str(layer.eviction.accumulates),
        group=layer.eviction.group, shifts=(start, end - (k.stop - k.start)), among=among,
        softcap=sizes.softcap, sinks=layer.sinks, chunk=sizes.chunk,
    )  # fmt: skip
