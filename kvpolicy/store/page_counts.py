"""How many pages are free, held and needed, for who decides what may enter a cache.

Pages are counted by pool: layers whose heads are of one size share one. Each function waits for the
device once a pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import check_rows
from .._fields import check_int
from ..ops import pages_of
from .checks import check_state
from .layer import LayerStore
from .pool import PagePool
from .state import CacheState


def free_pages(state: CacheState) -> dict[PagePool, int | None]:
    """Pages that the cache can still take before `max_bytes`, growth included; None without one.

    Those that are reserved for other caches of the pools are left out, its own are not.
    """
    check_state(state)
    return state.devices.free()


def held_pages(state: CacheState) -> dict[PagePool, list[int]]:
    """Pages of each sequence; those that forks share count for each of their holders."""
    check_state(state)
    found = {
        pool: torch.zeros(state.batch, dtype=torch.int64, device=pool.device)
        for pool in state.devices.pools
    }
    for pool in found:
        counts = [x.counts for x in state.managed if x.pool is pool]
        if counts:  # layers of a pool may have other numbers of heads
            found[pool] += pages_of(torch.cat(counts, 1), pool.page_size).sum(1)
    return {pool: rows.tolist() for pool, rows in found.items()}


def step_pages(state: CacheState, steps: int) -> dict[PagePool, int]:
    """Pages that the active sequences may need to decode `steps` tokens each."""
    check_state(state)
    check_int("steps", steps, 0)

    def need(layer: LayerStore) -> Tensor:
        size = layer.pool.page_size
        more = pages_of(layer.counts + steps, size) - pages_of(layer.counts, size)
        return more.masked_fill(~state.on(layer).active[:, None], 0)

    return state.devices.count(state.managed, need)


def prompt_pages(state: CacheState, added: Sequence[int]) -> dict[PagePool, int]:
    """Pages that a prompt call of `added[b]` tokens a sequence needs if all are admitted.

    Raises ValueError for anything but a number from 0 for each sequence.
    """
    check_state(state)
    check_rows("added", added, "a number of tokens for each sequence")
    if len(added) != state.batch or any(n < 0 for n in added):
        raise ValueError(f"added: wanted {state.batch} numbers from 0, got {list(added)}")

    def need(layer: LayerStore) -> Tensor:
        leaving = [
            max(length + new - layer.window, 0) - max(length - layer.window, 0)
            for length, new in zip(state.lengths, added, strict=True)
        ]
        size = layer.pool.page_size
        after = layer.counts + torch.tensor(leaving, device=layer.device)[:, None]
        return pages_of(after, size) - pages_of(layer.counts, size)

    return state.devices.count(state.managed, need)
