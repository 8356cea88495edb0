"""Writing decoded tokens where sequences have arenas of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, Arenas, Heads, Pages, Ring
from .cache_write import append


def arena_write(
    pages: Pages,
    heads: Heads,
    ring: Ring,
    arenas: Arenas,
    key: Tensor,
    value: Tensor,
    flags: Tensor | None,
    rows: Tensor,
    lengths: Tensor,
    active: Tensor,
    window: int,
    *,
    minmax: bool = False,
    bits: int = 0,
) -> None:
    """Writes one decoded token of each of some sequences: `Ops.arena_write`."""
    table, counts = heads
    on = active[rows.long()].nonzero()[:, 0]
    row = rows.long()[on]
    before, size = lengths[row].long(), pages.k.shape[1]
    slot = ring.slot(before - window).clamp(min=0)
    k, v, f = (x[row, :, slot] for x in ring)  # what leaves the window, [n, Hkv, ...]
    wanted = ((f & ADMITTED) > 0) & (before >= window)[:, None]
    held = counts[row]
    fresh = wanted & (held % size == 0)
    number = arenas.taken[row, None] + fresh.cumsum(1, dtype=torch.int32) - fresh.int()
    granted = fresh & (number < arenas.room[row, None])
    stored = wanted & (~fresh | granted)
    at, head = granted.nonzero(as_tuple=True)
    place = row[at], head, (held[at, head] // size).long()
    table[place] = arenas.page(row[at], number[at, head])
    position = (before - window).int()
    append(
        pages, table, k.transpose(0, 1), v.transpose(0, 1), position.expand(len(held.T), -1),
        torch.where(stored, held, -1).T.contiguous(), row.int(),
    )  # fmt: skip
    if minmax:
        _extend(pages, table, row, held, stored, k)
    counts[row] = held + stored
    arenas.taken[row] += granted.sum(1, dtype=torch.int32)
    arenas.refused[row] += (wanted & ~stored).sum(1)
    new = torch.full_like(f, bits) if flags is None else flags[on] | bits
    slot = ring.slot(before)
    for store, token in zip(ring, (key[on], value[on], new), strict=True):
        store[row, :, slot] = token


def _extend(
    pages: Pages, table: Tensor, row: Tensor, held: Tensor, stored: Tensor, key: Tensor
) -> None:
    """Extends the minima and maxima of pages by keys `[n, Hkv, D]` that were `stored`."""
    assert pages.summary is not None
    size = pages.k.shape[1]
    at, head = stored.nonzero(as_tuple=True)
    count = held[at, head]
    page = table[row[at], head, (count // size).long()].long()
    low, high = pages.summary[page].view(len(page), 2, key.shape[-1]).unbind(1)
    first, key = (count % size == 0)[:, None], key[at, head]
    low = torch.where(first, key, torch.minimum(low, key))
    high = torch.where(first, key, torch.maximum(high, key))
    pages.summary[page] = torch.cat([low, high], -1)
