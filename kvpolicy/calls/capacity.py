"""Capacity: room for what a call brings is reserved, or the call refused, before it writes.

Decoding: pages and tokens are reserved for some steps at once, so a cap is never exceeded. With
`at_cap="evict"` a full cache first drops the tokens that the pipeline's eviction scores lowest: of
heads at `max_tokens` as many as `interval` steps can add; at `max_bytes` the same fraction of every
head, until the pages suffice.

Prompts: what a call admits is known only while it runs. With "raise" the layer that would exceed a
cap raises. With "evict", `max_bytes` is met by making room beforehand for the whole call as if all
of it were admitted, and `max_tokens` by evicting at its end: chunks keep what lies between short.

Ranks that share the heads have pools and counts of their own. They reserve for the same steps, the
least of any, and evict together where one must.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch

from ..errors import CapacityError
from ..eviction import Eviction
from ..spec import CacheSpec
from ..store.layer import LayerStore
from ..store.numbers import most_stored, widen
from ..store.page_counts import prompt_pages, step_pages
from ..store.pool import PagePool
from ..store.state import CacheState
from .evict import shrink_to

_SHRINK = 0.9  # a round at max_bytes leaves this fraction of every head


def check(spec: CacheSpec, layer: int, window: int, eviction: Eviction) -> None:
    """Raises ValueError if the caps of `spec` leave no room in a layer, or cannot be kept there."""
    evicts = spec.at_cap == "evict" and spec.at(layer).window is None
    if evicts and eviction.neutral:
        raise ValueError(
            f"at_cap: 'evict' wants an eviction that scores tokens, got {eviction} for layer "
            f"{layer}"
        )
    if evicts and eviction.replayed:
        raise ValueError(
            f"at_cap: 'evict' wants scores at any time, those of {type(eviction).__name__} come "
            "from a replay; choose at_cap='raise'"
        )
    least = window + (spec.interval if evicts else 1)
    if spec.max_tokens is not None and spec.max_tokens < least:
        raise ValueError(
            f"max_tokens: wanted at least {least} (the window of {window} and "
            f"{'interval' if evicts else 'one'} more), got {spec.max_tokens}"
        )


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
    wanted = _least(state, wanted)
    fits = _try_steps(state, wanted)
    if not evicts:
        if not fits:
            _reserve_steps(state, least)
        state.steps_reserved = _least(state, state.steps_reserved)
    elif _any(state, not fits):
        _evict_pages(state, lambda: step_pages(state, wanted))
        _reserve_steps(state, wanted)


def _least(state: CacheState, own: int) -> int:
    """The least that a rank says."""
    return min(part[0] for part in state.exchange.numbers([own]))


def _any(state: CacheState, own: bool) -> bool:
    """Whether a rank says so."""
    return any(part[0] for part in state.exchange.numbers([own]))


def _try_steps(state: CacheState, steps: int) -> bool:
    try:
        _reserve_steps(state, steps)
    except CapacityError:
        return False
    return True


def reserve_long(state: CacheState, most: int) -> None:
    """Reserves for up to `most` decoded tokens: `interval`, or more while their pages are few.

    Reserving reads the device, so a long reservation keeps the host out of decoding.
    """
    steps = state.devices.spare_steps(state.managed, most)
    reserve(state, 1, max(steps, state.spec.interval))


def take(state: CacheState, added: tuple[int, ...]) -> None:
    """Makes room for a prompt call of `added[b]` tokens a sequence, if it can be made.

    Its layers take their pages as they write; nothing is reserved for decoding any more.
    """
    if state.spec.at_cap == "evict" and state.spec.max_bytes is not None:
        # What is admitted may fit all the same; if it does not, the layer that writes it raises.
        with contextlib.suppress(CapacityError):
            _evict_pages(state, lambda: prompt_pages(state, added))
    widen(state, most_stored(state.layers) + max(added, default=0))
    state.devices.release()
    state.steps_reserved = 0


def release(state: CacheState) -> None:
    """A prompt call has ended: brings every head back to `max_tokens` where `at_cap` says so."""
    if state.spec.max_tokens is None or state.spec.at_cap == "raise":
        return
    most = state.spec.max_tokens
    for row, layers in zip(state.sequences, _stored(state), strict=True):
        row.overshoot = max(row.overshoot, max(map(max, layers), default=0) - most)
    _evict_tokens(state, most, [True] * state.batch)


def check_tokens(state: CacheState, layer: LayerStore, counts: list[list[int]]) -> None:
    """Raises CapacityError if `counts` `[B][Hkv]` global tokens make a head exceed `max_tokens`.

    They are the layer's when the open prompt call has ended. With `at_cap="evict"` it may.
    """
    most, call = state.spec.max_tokens, state.call
    if most is None or state.spec.at_cap == "evict" or call is None:
        return
    rows = zip(map(max, counts), state.lengths, call.added, strict=True)
    for row, (held, length, added) in enumerate(rows):
        tokens = held + min(length + added, layer.window)
        if tokens > most:
            raise _too_many(row, layer.index, tokens, most)


def _too_many(row: int, layer: int, tokens: int, most: int) -> CapacityError:
    return CapacityError(
        f"max_tokens: a head of sequence {row} would hold {tokens} tokens in layer {layer}, the "
        f"cap is {most}; raise it, admit less, or choose at_cap='evict' with an eviction",
        row=row,
    )


def _reserve_steps(state: CacheState, steps: int) -> None:
    """Keeps pages for `steps` decoded tokens a sequence."""
    state.devices.reserve(step_pages(state, steps))
    widen(state, most_stored(state.layers) + steps)
    state.steps_reserved = steps


def _stored(state: CacheState) -> list[list[list[int]]]:
    """Tokens `[row][layer][head]` with the window, of the layers that policies manage."""
    layers = state.managed
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
        if not state.sequences[row].active:
            continue
        for layer, heads in zip(state.managed, layers, strict=True):
            if max(heads) + least > most:
                raise _too_many(row, layer.index, max(heads) + least, most)
            room = min(room, most - max(heads))
    return room


def _evict_tokens(state: CacheState, most: int, rows: list[bool]) -> None:
    """Leaves at most `most` tokens in every head of the sequences `rows`."""
    stored = _stored(state)
    limits = [most if on else 1 << 30 for on in rows]
    over = (n > limit for row, limit in zip(stored, limits, strict=True) for x in row for n in x)
    if not _any(state, any(over)):
        return
    windows = [layer.window for layer in state.managed]
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
            for layer in state.managed
            if layer.pool is pool
        )
        if pool.room is not None and count > pool.room + own:
            return False
    return True


def _evict_pages(state: CacheState, need: Callable[[], Mapping[PagePool, int]]) -> None:
    """Drops tokens until the pages that are needed then can be taken, or raises CapacityError.

    Where ranks share the heads, those that have the pages keep their tokens.
    """
    fraction = _SHRINK
    while True:
        pages = need()
        full, hopeless = None, False
        try:
            state.provide(pages)
        except CapacityError as error:
            full, hopeless = error, not _attainable(state, pages)
        if _any(state, hopeless):
            raise full or CapacityError("max_bytes: another rank has no room, whatever is dropped")
        if not _any(state, full is not None):
            return
        own = fraction if full else 1.0
        by_row = zip(*(layer.counts.tolist() for layer in state.managed), strict=True)
        targets = [[[int(own * n) for n in heads] for heads in row] for row in by_row]
        try:
            _shrink(state, targets)
        except CapacityError:
            # Tokens that move within pages of a fork need copies; fewer tokens need fewer.
            if fraction == 0:
                raise
            fraction = fraction / 2 if fraction > 0.1 else 0


def _shrink(state: CacheState, targets: list[list[list[int]]]) -> None:
    gone = shrink_to(state, targets)
    for row, count in zip(state.sequences, gone, strict=True):
        row.cap_evicted += count
