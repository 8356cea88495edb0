"""Pages for what a layer of a prompt call writes, if possible without waiting for the device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..ops import Bounds, Segments, pages_of
from ..store.layer import LayerStore
from ..store.pool import PagePool
from ..store.state import CacheState, Call
from ..store.trimming import trim
from .capacity import check_tokens

Rows = list[list[int]]
SPARE = 8  # a layer may be given 1/8 of the pool's pages more than it turns out to take
# Bytes of pages that a whole call may be given, and those that are not missed if it leaves them.
WHOLE, LEFT = 256 << 20, 64 << 20
LONG = 4096  # tokens of a first prompt from which on it matters what one expects to be admitted


def make_room(
    state: CacheState, call: Call, layer: LayerStore, seg: Segments, after: Tensor, fresh: Tensor
) -> Bounds:
    """Makes sure that `fresh` `[B, Hkv]` pages are free, and says what the host knows of `after`.

    Only the host can make the pool grow. Where little can be admitted in all layers together, it
    provides for that once a call. Else it either waits for these numbers, and the device idles
    until it goes on; or it provides for all tokens of the layer being admitted, and reads a layer
    later how many were. It waits for caches that are small, capped in tokens or empty, in the first
    layer of a call, where that many pages would go beyond a cap in bytes, and where free pages have
    to be counted anew (see `FreePages`).
    """
    pool = layer.pool
    leaving = _leaving(state, call, layer)
    if pool not in call.promised:
        call.promised[pool] = _promise(state, call, pool)
    if call.promised[pool]:
        state.devices.took(pool, _most(layer, leaving))
        before = call.held[layer.index]
        most = _all(before, leaving)
        return Bounds(most, _expected(before, most, layer, seg))
    held = call.held.get(layer.index)
    # Without earlier tokens nothing says what to expect but the counts themselves; beside sequences
    # that have some, it may be all.
    past = any(at > layer.window for at, n in zip(seg.start, call.added, strict=True) if n)
    if past and held is not None and _ahead(state, layer, leaving, fresh):
        after_all = _all(held, leaving)
        return Bounds(after_all, _expected(held, after_all, layer, seg))
    pool.drain()
    # Once a call it asks for all layers.
    others = [] if held is not None else [x for x in state.layers if x.pool is pool]
    earlier = [call.before.get(x.index, x.counts).flatten() for x in others]
    numbers = torch.cat([after.flatten(), fresh.flatten(), pool.top, *earlier]).tolist()
    size, heads = after.numel(), after.shape[1]
    _hear(call, others, numbers[2 * size + 1 :])
    exact = _rows(numbers[:size], heads)
    check_tokens(state, layer, exact)
    pool.provide_for_write(sum(numbers[size : 2 * size]), numbers[2 * size])
    before = call.held[layer.index]
    likely = _expected(before, _all(before, leaving) if past else exact, layer, seg)
    return Bounds(exact, likely)


def give_back(state: CacheState, call: Call) -> None:
    """After a prompt call: pages that were promised and not taken are anybody's again.

    Memory that a pool got for them goes where it is much.
    """
    state.devices.release()
    for pool, pages in call.promised.items():
        if pages > max(LEFT // pool.page_bytes, pool.capacity // SPARE):
            trim(pool)


def _promise(state: CacheState, call: Call, pool: PagePool) -> int:
    """Pages kept for all that layers may admit in this call, or 0 where that would be too many.

    The host asks once, for what is free and what layers held before.
    """
    layers = [x for x in state.layers if x.pool is pool]
    leaving = [[0] if x.slides else _leaving(state, call, x) for x in layers]
    pages = sum(_most(x, n) for x, n in zip(layers, leaving, strict=True))
    few = pages <= max(WHOLE // pool.page_bytes, pool.capacity // SPARE)
    capped = state.spec.max_tokens is not None
    begun, long = any(state.lengths), max(call.added) > LONG
    if (
        pool.moving
        and not capped
        and pool.limit is None
        and all(x.admission.neutral or x.slides for x in layers)
    ):
        _grow_once(pool, pages)
    if not few or capped or pool.moving or (long and not begun):
        return 0
    pool.drain()
    before = [call.before.get(x.index, x.counts).flatten() for x in layers] if begun else []
    free, *numbers = torch.cat([pool.top, *before]).tolist()
    if not pool.fits(pages, free):
        return 0
    try:
        state.devices.promise(pool, pages, free)
    except torch.OutOfMemoryError:  # what is admitted may fit
        return 0
    _hear(call, layers, numbers or [0] * sum(x.counts.numel() for x in layers))
    return pages


def _grow_once(pool: PagePool, pages: int) -> None:
    """Makes so many pages free, where growth moves all others: layer by layer it would copy most
    of the cache again and again, and hold it twice while it does."""
    with contextlib.suppress(torch.OutOfMemoryError):  # layers ask for their own part
        pool.drain()
        pool.provide(pages)


def _hear(call: Call, layers: list[LayerStore], numbers: list[int]) -> None:
    """Keeps what layers, one after the other, held before the call."""
    at = 0
    for layer in layers:
        end = at + layer.counts.numel()
        call.held[layer.index] = _rows(numbers[at:end], layer.counts.shape[1])
        at = end


def _leaving(state: CacheState, call: Call, layer: LayerStore) -> list[int]:
    """Tokens of each sequence that leave the window of a layer in this call."""
    rows = zip(state.lengths, call.added, strict=True)
    return [max(min(had, layer.window) + new - layer.window, 0) if new else 0 for had, new in rows]


def _most(layer: LayerStore, leaving: list[int]) -> int:
    """Pages that a layer's heads take at most for so many more tokens of each sequence."""
    size = layer.pool.page_size
    return sum(pages_of(n, size) for n in leaving) * layer.counts.shape[1]


def _ahead(state: CacheState, layer: LayerStore, leaving: list[int], fresh: Tensor) -> bool:
    """Whether pages for all tokens of a layer that leave the window could be made free."""
    pool = layer.pool
    most = _most(layer, leaving)
    if state.spec.max_tokens is not None or pool.moving or most > pool.capacity // SPARE:
        return False
    free = pool.known.settle()
    if free is None or not pool.fits(most, free):
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


def _all(held: Rows, leaving: list[int]) -> Rows:
    """Counts if all tokens that leave the window are admitted."""
    return [[n + new for n in row] for row, new in zip(held, leaving, strict=True)]


def _rows(numbers: list[int], heads: int) -> Rows:
    return [numbers[at : at + heads] for at in range(0, len(numbers), heads)]
