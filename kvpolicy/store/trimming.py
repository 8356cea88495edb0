"""Giving a pool's memory back: pages move together, and what then lies unused goes."""

from __future__ import annotations

import torch

from .extents import SLAB_PAGES
from .pool import PagePool


def trim(pool: PagePool) -> None:
    """Moves pages to low ids and drops the memory that then lies unused at the end.

    Some slack stays: a twentieth of what is in use or reserved, and the rest of a slab.
    """
    live = pool.used + pool.reserved
    wanted = (-(-(live + 1) // SLAB_PAGES) + live // 20 // SLAB_PAGES) * SLAB_PAGES
    capacity, kept = wanted, 1
    if not pool.moving:
        capacity = pool.extents[0][0].shape[0]
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
    for table in pool.tables():
        table.copy_(remap[table.long()])
    # What is broken off from here on leaves stores that are too long, never too short.
    pool.refs[capacity:] = 0
    pool.capacity = capacity
    if pool.moving:
        pool.free, pool.refs = pool.free[:capacity].clone(), pool.refs[:capacity].clone()
    else:
        pool.extents = pool.extents[:kept]
    pool.known.forget()
    pool.top.zero_()
    pool.push(unused[high.numel() :].int())
    pool.refresh()
    if pool.moving:
        _free_values(pool, capacity)
        # Storages of their own, so that larger ones are not kept alive.
        pool.replace(lambda store: store[:capacity].clone())


def _free_values(pool: PagePool, capacity: int) -> None:
    """Moves the values of the first `capacity` pages behind the keys of these, if they fit there.

    The memory of all values is then free before anything is held twice.
    """
    keys, values = pool.extents[0][:2]
    unused, need = keys[capacity:].flatten(), values[:capacity].numel()
    if need > unused.numel():
        return
    moved, at = unused[:need].view(capacity, *values.shape[1:]), values.data_ptr()
    moved.copy_(values[:capacity])
    del values
    pool.replace(lambda store: moved if store.data_ptr() == at else store)
