"""Pages for what a layer of a prompt call writes, if possible without waiting for the device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..ops import Bounds, Segments, pages_of
from ..store.layer import LayerStore
from ..store.state import CacheState, Call
from .capacity import check_tokens

Rows = list[list[int]]
SPARE = 8  # a layer may be given 1/8 of the pool's pages more than it turns out to take


def make_room(
    state: CacheState, call: Call, layer: LayerStore, seg: Segments, after: Tensor, fresh: Tensor
) -> Bounds:
    """Makes sure that `fresh` `[B, Hkv]` pages are free, and says what the host knows of `after`.

    Only the host can make the pool grow. Either it waits for these numbers, and the device idles
    until it goes on; or it provides for all tokens being admitted, and reads a layer later how many
    were. It waits for caches that are small, capped or empty (a row of them suffices), in the first
    layer of a call, and where free pages have to be counted anew (see `FreePages`).
    """
    pool = layer.pool
    leaving = [max(b - a - layer.window, 0) for a, b in pairwise(seg.cu_k)]
    held = call.held.get(layer.index)
    # Without earlier tokens nothing says what to expect but the counts themselves.
    past = all(at > layer.window for at, n in zip(seg.start, call.added, strict=True) if n)
    if past and held is not None and _ahead(state, layer, leaving, fresh):
        after_all = [[n + new for n in row] for row, new in zip(held, leaving, strict=True)]
        return Bounds(after_all, _expected(held, after_all, layer, seg))
    pool.drain()
    # Once a call it asks for all layers.
    others = [] if held is not None else [x for x in state.layers if x.pool is pool]
    before = [call.before.get(x.index, x.counts).flatten() for x in others]
    top = pool.top.view(1)
    numbers = torch.cat([after.flatten(), fresh.flatten(), top, *before]).tolist()
    size, heads = after.numel(), after.shape[1]
    for place, other in enumerate(others):
        call.held[other.index] = _rows(numbers[(2 + place) * size + 1 :][:size], heads)
    exact = _rows(numbers[:size], heads)
    check_tokens(state, layer, exact)
    pool.provide_for_write(sum(numbers[size : 2 * size]), numbers[2 * size])
    return Bounds(exact, _expected(call.held[layer.index], exact, layer, seg))


def _ahead(state: CacheState, layer: LayerStore, leaving: list[int], fresh: Tensor) -> bool:
    """Whether pages for all tokens of a layer that leave the window could be made free."""
    pool = layer.pool
    most = sum(pages_of(n, pool.page_size) for n in leaving) * fresh.shape[1]
    capped = pool.limit is not None or state.spec.max_tokens is not None
    if capped or pool.moving or most > pool.capacity // SPARE:
        return False
    free = pool.known.settle()
    if free is None:
        return False
    if free < most + pool.reserved:
        try:
            pool.provide(most, free)
        except torch.OutOfMemoryError:  # what is admitted may fit
            return False
    # A cache that went just now no longer reserves the pages that it took.
    if pool.orphans:
        return False
    pool.known.take(most, fresh, pool.top)
    return True


def _expected(before: Rows, after: Rows, layer: LayerStore, seg: Segments) -> Rows:
    """Counts after a call that admits as much of its tokens as the cache holds of earlier ones.

    `after` itself for what has no earlier ones. Also where the counts are known: what depends on
    them does not depend on whether the host waited.
    """
    found = []
    for row, (held, last) in enumerate(zip(before, after, strict=True)):
        past = seg.start[row] - layer.window
        total = past + seg.cu_q[row + 1] - seg.cu_q[row]
        found.append([n * total // past for n in held] if past > 0 else last)
    return found


def _rows(numbers: list[int], heads: int) -> Rows:
    return [numbers[at : at + heads] for at in range(0, len(numbers), heads)]
