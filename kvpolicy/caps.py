"""Caps on a cache: room is made, or the call refused, before anything is written.

Decoding: pages and tokens are reserved for some steps at once, so a cap is never exceeded. With
`at_cap="evict"` a full cache first drops the tokens that the pipeline's eviction scores lowest: of
heads at `max_tokens` as many as `interval` steps can add; at `max_bytes` the same fraction of every
head, until the pages suffice.

Prompts: what a call admits is known only while it runs. With "raise" the layer that would exceed a
cap raises. With "evict", `max_bytes` is met by making room beforehand for the whole call as if all
of it were admitted, and `max_tokens` by evicting at its end: chunks keep what lies between short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch

from .errors import CapacityError
from .evicting import shrink_to
from .store.layer import LayerStore
from .store.limits import too_many
from .store.pages import PagePool
from .store.state import CacheState

_SHRINK = 0.9  # a round at max_bytes leaves this fraction of every head


def reserve(state: CacheState, least: int, wanted: int) -> None:
    """Lets every active sequence decode `least` tokens, and up to `wanted` where they fit.

    Raises CapacityError, with nothing written, where they do not.
    """
    evicts = state.spec.at_cap == "evict"
    if evicts:
        wanted = max(least, state.spec.interval)  # evictions come at the same steps in every loop
    if state.spec.max_tokens is not None:
        if evicts:
            _evict_tokens(state, state.spec.max_tokens - wanted, state.active)
        wanted = min(wanted, _room(state, least))
    try:
        state.reserve_pages(wanted)
    except CapacityError:
        if not evicts:
            state.reserve_pages(least)
            return
        _evict_pages(state, lambda: state.pages_for(wanted))
        state.reserve_pages(wanted)


def before_prompt(state: CacheState, added: tuple[int, ...]) -> None:
    """Makes room for a prompt call of `added[b]` tokens a sequence, if it can be made."""
    if state.spec.at_cap == "raise" or state.spec.max_bytes is None:
        return
    size = state.spec.page_size

    def need() -> dict[PagePool, int]:
        found = dict.fromkeys(state.pools.values(), 0)
        for layer in _managed(state):
            leaving = [
                max(length + new - layer.window, 0) - max(length - layer.window, 0)
                for length, new in zip(state.lengths, added, strict=True)
            ]
            after = layer.counts + torch.tensor(leaving, device=layer.counts.device)[:, None]
            found[layer.pool] += int((-(-after // size) + -layer.counts // size).sum())
        return found

    # What is admitted may fit all the same; if it does not, the layer that writes it raises.
    with contextlib.suppress(CapacityError):
        _evict_pages(state, need)


def after_prompt(state: CacheState) -> None:
    """Brings every head back to `max_tokens`."""
    if state.spec.max_tokens is None or state.spec.at_cap == "raise":
        return
    most = state.spec.max_tokens
    held = [max(map(max, row), default=0) for row in _stored(state)]
    state.overshoot = [max(was, n - most) for was, n in zip(state.overshoot, held, strict=True)]
    _evict_tokens(state, most, [True] * state.batch)


def _managed(state: CacheState) -> list[LayerStore]:
    return [layer for layer in state.layers if not layer.slides]


def _stored(state: CacheState) -> list[list[list[int]]]:
    """Tokens `[row][layer][head]` with the window, of the layers that policies manage."""
    layers = _managed(state)
    if not layers:
        return [[] for _ in state.lengths]
    counts = torch.stack([layer.counts.to(layers[0].counts.device) for layer in layers], 1)
    return [
        [
            [n + min(length, layer.window) for n in heads]
            for layer, heads in zip(layers, row, strict=True)
        ]
        for row, length in zip(counts.tolist(), state.lengths, strict=True)
    ]


def _room(state: CacheState, least: int) -> int:
    """Steps that every active sequence can decode; CapacityError if they are fewer than `least`."""
    most, room = state.spec.max_tokens, 1 << 30
    assert most is not None
    for row, layers in enumerate(_stored(state)):
        if not state.active[row]:
            continue
        for layer, heads in zip(_managed(state), layers, strict=True):
            if max(heads) + least > most:
                raise too_many(row, layer.index, max(heads) + least, most)
            room = min(room, most - max(heads))
    return room


def _evict_tokens(state: CacheState, most: int, rows: list[bool]) -> None:
    """Leaves at most `most` tokens in every head of the sequences `rows`."""
    stored = _stored(state)
    limits = [most if on else 1 << 30 for on in rows]
    over = (n > limit for row, limit in zip(stored, limits, strict=True) for x in row for n in x)
    if not any(over):
        return
    windows = [layer.window for layer in _managed(state)]
    targets = [
        [
            [max(min(n, limit) - min(length, window), 0) for n in heads]
            for heads, window in zip(row, windows, strict=True)
        ]
        for row, length, limit in zip(stored, state.lengths, limits, strict=True)
    ]
    _shrink(state, targets)


def _attainable(state: CacheState, pages: Mapping[PagePool, int]) -> bool:
    """Whether dropping every global token would make so many pages available."""
    for pool, count in pages.items():
        own = sum(
            int(((layer.table > 0) & (pool.refs[layer.table.long()] == 1)).sum())
            for layer in _managed(state)
            if layer.pool is pool
        )
        if pool.room is not None and count > pool.room + own:
            return False
    return True


def _evict_pages(state: CacheState, need: Callable[[], Mapping[PagePool, int]]) -> None:
    """Drops tokens until the pages that are needed then can be taken, or raises CapacityError."""
    fraction = _SHRINK
    while True:
        pages = need()
        try:
            state.secure(pages)
            return
        except CapacityError:
            if not _attainable(state, pages):
                raise
        by_row = zip(*(layer.counts.tolist() for layer in _managed(state)), strict=True)
        targets = [[[int(fraction * n) for n in heads] for heads in row] for row in by_row]
        try:
            _shrink(state, targets)
        except CapacityError:
            # Tokens that move within pages of a fork need copies; fewer tokens need fewer.
            if fraction == 0:
                raise
            fraction = fraction / 2 if fraction > 0.1 else 0


def _shrink(state: CacheState, targets: list[list[list[int]]]) -> None:
    gone = shrink_to(state, targets)
    state.cap_evicted = [a + b for a, b in zip(state.cap_evicted, gone, strict=True)]
