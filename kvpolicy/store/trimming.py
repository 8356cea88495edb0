"""Giving a pool's memory back: pages move together, and what then lies unused goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .extents import SLAB_PAGES

if TYPE_CHECKING:
    from .pages import PagePool


def trim(pool: PagePool) -> None:
    """Moves pages to low ids and drops the memory that then lies unused at the end.

    Some slack stays: a twentieth of what is in use or promised, and the rest of a slab.
    """
    live = pool.used + sum(pool.holders.values())
    wanted = (-(-(live + 1) // SLAB_PAGES) + live // 20 // SLAB_PAGES) * SLAB_PAGES
    if pool.moving:
        capacity = wanted
    else:
        capacity, kept = pool.extents[0][0].shape[0], 1
        while capacity < wanted and kept < len(pool.extents):
            capacity += pool.extents[kept][0].shape[0]
            kept += 1
    if capacity >= pool.capacity:
        return
    held = (pool.refs[: pool.capacity] > 0).nonzero().squeeze(1)
    high = held[held >= capacity]
    unused = (pool.refs[1:capacity] == 0).nonzero().squeeze(1) + 1
    target = unused[: high.numel()]
    pool.copy(pool.pages, high, target)
    pool.refs[target] = pool.refs[high]
    remap = torch.arange(pool.capacity, dtype=torch.int32, device=pool.device)
    remap[high] = target.int()
    holders = list(pool.holders)  # none of them becomes an orphan below
    tables = [x.table for state in holders for x in state.layers if x.pool is pool]
    for table in tables + pool.orphans:
        table.copy_(remap[table.long()])
    if pool.moving:
        # An extent of its own, so that the larger storage is not kept alive.
        kept_pages = (None if t is None else t[:capacity].clone() for t in pool.extents[0])
        pool.extents = [tuple(kept_pages)]  # type: ignore[list-item]
        pool.free, pool.refs = pool.free[:capacity].clone(), pool.refs[:capacity].clone()
    else:
        pool.extents = pool.extents[:kept]
    pool.refs[capacity:] = 0
    pool.capacity = capacity
    pool.unseen.forget()
    pool.top.zero_()
    pool.push(unused[high.numel() :].int())
    pool.refresh()
