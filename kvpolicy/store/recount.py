"""Counting pages anew after something was broken off."""

from __future__ import annotations

import torch

from .pool import PagePool


def recount(pool: PagePool) -> None:
    """Makes reference counts and free stack what the caches' tables say.

    After a write, a copy or an eviction that was broken off: pages that it took and put into no
    table, or counted and did not give back, are free again.
    """
    ids = [torch.zeros(0, dtype=torch.int32, device=pool.device)]
    ids += [table.flatten() for table in pool.tables()]
    counts = torch.bincount(torch.cat(ids), minlength=pool.capacity)
    pool.refs.zero_()
    pool.refs[1 : pool.capacity] = counts[1 : pool.capacity].int()
    pool.top.zero_()
    pool.push((pool.refs[1 : pool.capacity] == 0).nonzero().squeeze(1).int() + 1)
    pool.known.forget()
    pool.refresh()
