"""Sums over queries before RoPE, and rings of what evictions read of the last tokens.

Whole blocks of positions are added to the sums once no rollback can take them back; younger queries
lie in a ring. So nothing has to be undone, and as a block is one product of one shape, and blocks
are added in their order, sums do not depend on how tokens were cut into calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..eviction import QueryStats
from ..ops import ring_slot
from .layer import LayerStore
from .state import CacheState

BLOCK = 256  # positions that are added at once
SLACK = 64  # decoded tokens between two additions, at least


def slots(rollback: int) -> int:
    """Queries that a ring holds: an unfinished block, what may be taken back and come anew."""
    return BLOCK + 2 * rollback + SLACK


def summed_at(length: int, rollback: int) -> int:
    """Tokens of a sequence of `length` whose queries are in the sums for good."""
    return max(length - rollback, 0) // BLOCK * BLOCK


def keep_prompt(state: CacheState, layer: LayerStore, query: Tensor, ends: tuple[int, ...]) -> None:
    """Takes the queries `[Hq, T, D]` of a prompt call; sequence b has those up to `ends[b]`."""
    first = 0
    for row, end in enumerate(ends):
        _keep(state, layer, row, query[:, first:end])
        first = end


def keep_columns(state: CacheState, layer: LayerStore, query: Tensor, valid: Tensor) -> None:
    """Takes `[B, Hq, T, D]` of a decode call that has more columns than can be taken back."""
    for row, on in enumerate(state.active):
        if on:
            real = valid[row].to(query.device)
            _keep(state, layer, row, query[row][:, real])


def _keep(state: CacheState, layer: LayerStore, row: int, new: Tensor) -> None:
    """Adds the blocks that new queries `[Hq, n, D]` of a sequence complete, and keeps the last."""
    assert layer.query_ring is not None
    count, start = new.shape[1], state.sequences[row].length
    if not count:
        return
    ring, end = layer.query_ring[row], start + count
    done = state.sequences[row].summed
    for block in range(done, summed_at(end, state.spec.rollback), BLOCK):
        old_end = max(block, min(block + BLOCK, start))
        at = torch.arange(block, old_end, device=new.device)
        old = ring[:, ring_slot(at, ring.shape[1])]
        fresh = new[:, max(block - start, 0) : max(block + BLOCK - start, 0)]
        _add(layer, row, block, torch.cat([old, fresh], 1))
    at = torch.arange(max(start, end - ring.shape[1]), end, device=new.device)
    ring.index_copy_(1, ring_slot(at, ring.shape[1]), new[:, -at.numel() :])


def put(ring: Tensor, new: Tensor, lengths: Tensor, active: Tensor) -> None:
    """Writes `[B, H, D]` to the slot of position `lengths` `[B]` of a ring where `active` `[B]`.

    Waits for nothing, so that a captured step holds it.
    """
    index = ring_slot(lengths, ring.shape[2])[:, None, None, None].expand(*new.shape[:2], 1, -1)
    index = index.expand(-1, -1, -1, ring.shape[3])
    new = torch.where(active[:, None, None, None], new[:, :, None], ring.gather(2, index))
    ring.scatter_(2, index, new)


def is_full(state: CacheState, added: tuple[int, ...]) -> bool:
    """Whether rings of queries lack room for `added` tokens a sequence beside those not summed."""
    if not any(layer.query_ring is not None for layer in state.layers):
        return False
    room = slots(state.spec.rollback)
    return any(
        row.length + n - row.summed > room for row, n in zip(state.sequences, added, strict=True)
    )


def settle(state: CacheState) -> None:
    """Adds every block that no rollback can take back. The host's lengths are the device's."""
    goals = [summed_at(row.length, state.spec.rollback) for row in state.sequences]
    for layer in state.layers:
        if layer.query_ring is None:
            continue
        for row, goal in enumerate(goals):
            for block in range(state.sequences[row].summed, goal, BLOCK):
                _add(layer, row, block, _block(layer.query_ring[row], block, block + BLOCK))
    committed(state, [1] * state.batch)


def committed(state: CacheState, added: Sequence[int]) -> None:
    """Counts what `keep_prompt`, `keep_columns` or `settle` added for sequences with new tokens."""
    for row, n in zip(state.sequences, added, strict=True):
        if n:
            row.summed = max(row.summed, summed_at(row.length, state.spec.rollback))


def query_stats(
    state: CacheState, layer: LayerStore, shared: dict[Any, Any] | None = None
) -> QueryStats:
    """Count, mean and covariance of a layer's queries before RoPE.

    Counts, once for layers that skip as many, are in `shared`.
    """
    assert layer.query_ring is not None and layer.query_sums is not None
    assert layer.query_products is not None
    skip, means, covariances = layer.eviction.query_skip, [], []
    shared = {} if shared is None else shared
    key = "counted", layer.eviction.query_skip, layer.device
    for row, host in enumerate(state.sequences):
        total, product = layer.query_sums[row], layer.query_products[row]
        if not host.summed:
            total, product = torch.zeros_like(total), torch.zeros_like(product)
        for block in range(host.summed, host.length, BLOCK):
            held = _block(layer.query_ring[row], block, host.length)
            held = _wide(held, block, skip, total.dtype)
            total, product = total + held.sum(1), torch.baddbmm(product, held.mT, held)
        count = max(host.length - skip, 1)
        mean = total / count
        means.append(mean)
        outer = mean[:, :, None], mean[:, None]
        covariances.append(torch.addcmul(product / count, *outer, value=-1))
    if key not in shared:
        shared[key] = (state.on(layer).lengths - skip).clamp(min=0)
    return QueryStats(shared[key], _batch(means), _batch(covariances))


def _batch(rows: Sequence[Tensor]) -> Tensor:
    """A stack; that of one row copies nothing."""
    return rows[0][None] if len(rows) == 1 else torch.stack([*rows])


def _block(ring: Tensor, first: int, end: int) -> Tensor:
    """Queries `[Hq, n, D]` of a block from `first` on, of positions below `end`."""
    slot, count = ring_slot(first, ring.shape[1]), min(BLOCK, end - first)
    found = ring[:, slot : slot + count]
    after = count - found.shape[1]  # of them the ring's first slots hold
    return torch.cat([found, ring[:, :after]], 1) if after else found


def _add(layer: LayerStore, row: int, first: int, block: Tensor) -> None:
    """Adds queries `[Hq, BLOCK, D]` from position `first` on to a sequence's sums."""
    assert layer.query_sums is not None and layer.query_products is not None
    total, product = layer.query_sums[row], layer.query_products[row]
    if not first:  # what lies there belonged to another sequence, or to a call that was aborted
        total.zero_()
        product.zero_()
    _sum(total, product, _wide(block, first, layer.eviction.query_skip, total.dtype))


def _wide(block: Tensor, first: int, skip: int, dtype: torch.dtype) -> Tensor:
    """The block with zeros for what is not there or does not count, `[Hq, BLOCK, D]`."""
    out = torch.zeros(block.shape[0], BLOCK, block.shape[2], dtype=dtype, device=block.device)
    left = min(max(skip - first, 0), block.shape[1])
    out[:, left : block.shape[1]] = block[:, left:]
    return out


def _sum(total: Tensor, product: Tensor, block: Tensor) -> None:
    total += block.sum(1)
    product.baddbmm_(block.mT, block)
