"""Plain values that policies, store, reference and kernels exchange."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import attrs
from torch import Tensor

POSITION_BITS = 30
POSITION_MASK = (1 << POSITION_BITS) - 1
ADMITTED = 1  # bit 0 of a ring slot's flags: enters the global cache when it leaves the window
MARKED = 2  # bit 1: kept by a decision taken at write time for the prompt's end


class Write(NamedTuple):
    """New tokens of one layer, packed over sequences, as an admission sees them.

    `key`, `value` are `[Hkv, T, D]` (keys after RoPE), `positions` `[T]` int64 counts real tokens
    of each sequence from 0, `cu_seqlens` `[B + 1]` int32 delimits sequences in T. `heads` are the
    global ids of the KV heads present (all of them without tensor parallelism). `key_pre` `[Hkv, T,
    D]` (keys before RoPE) and `hidden` `[T, hidden]` (attention input) are given only if the
    policy's `needs` names them.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    layer: int
    heads: range
    key_pre: Tensor | None = None
    hidden: Tensor | None = None


@attrs.frozen(eq=False, slots=False)
class EvictionView:
    """What one layer of the cache stores, as an eviction sees it.

    Global tokens, padded to the longest head: `keys`, `values` `[B, Hkv, N, D]`, `positions`
    `[B, Hkv, N]`, `valid` `[B, Hkv, N]`, and `marked` (decisions taken when the token was written).
    Local window in position order: `recent_keys` `[B, Hkv, W, D]`, `recent_valid` `[B, W]`,
    ending at position `lengths - 1` in the last column. With `needs.queries`: `queries`
    `[B, Hq, w, D]` (after RoPE) ending at the same position, `query_valid` `[B, w]`.
    `lengths` `[B]` counts the tokens seen; `scale` multiplies q.k.

    What comes from pages may be given as a function that returns the tensor; it is called when a
    policy first asks, so that a cache copies only what is used.
    """

    layer: int
    _keys: Tensor | Callable[[], Tensor]
    _values: Tensor | Callable[[], Tensor]
    _positions: Tensor | Callable[[], Tensor]
    valid: Tensor
    _marked: Tensor | Callable[[], Tensor]
    recent_keys: Tensor
    recent_valid: Tensor
    lengths: Tensor
    scale: float
    queries: Tensor | None = None
    query_valid: Tensor | None = None

    @cached_property
    def keys(self) -> Tensor:
        return _tensor(self._keys)

    @cached_property
    def values(self) -> Tensor:
        return _tensor(self._values)

    @cached_property
    def positions(self) -> Tensor:
        return _tensor(self._positions)

    @cached_property
    def marked(self) -> Tensor:
        return _tensor(self._marked)

    def _replace(self, **changes: Any) -> EvictionView:
        """A view with other values in the named places, as of a named tuple."""
        return attrs.evolve(self, **changes)

    def _asdict(self) -> dict[str, Any]:
        """All values by name, as of a named tuple."""
        names = (field.alias or field.name for field in attrs.fields(EvictionView))
        return {name: getattr(self, name) for name in names}


def _tensor(given: Tensor | Callable[[], Tensor]) -> Tensor:
    return given if isinstance(given, Tensor) else given()


class Pages(NamedTuple):
    """One device's pages, as every op takes them. Page 0 is the null page and holds nothing.

    `k`, `v` `[n, P, D]`, `meta` `[n, P]` int32 (`position | mark << POSITION_BITS`) and `summary`
    `[n, S]` (or None) are the first extent: all pages on the reference backend. Kernels find page
    `i` through `slabs` `[m, 4]` int64: row `i // slab_pages` holds where that slab of k, v, meta
    and summary starts, relative to the first extent and in units of 16 elements; inside the slab
    the page is number `i % slab_pages`. `slab_pages` is a power of two.
    `free` int32 `[c]` is the stack of unused page ids, `top` int32 `[1]` its height (the next page
    taken is `free[top - 1]`), `refs` int32 `[c]` counts the heads that hold a page.
    """

    k: Tensor
    v: Tensor
    meta: Tensor
    summary: Tensor | None
    slabs: Tensor
    slab_pages: int
    free: Tensor
    top: Tensor
    refs: Tensor


class Held(NamedTuple):
    """Global tokens `[B][Hkv]` of a layer after a prompt call's writes, as the host knows them.

    `most` are bounds, so that the host need not wait for the device; `expected` are guesses, which
    may decide how something is computed and never what.
    """

    most: list[list[int]]
    expected: list[list[int]]


class Segments(NamedTuple):
    """How packed queries and keys split over sequences in a prompt call; ints live on the host.

    Sequence b has queries `cu_q[b]:cu_q[b+1]` at positions `start[b], start[b]+1, ...` and keys
    `cu_k[b]:cu_k[b+1]` whose last one is at the last query's position. The tensors hold the same
    numbers on the device (int32).
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    start: tuple[int, ...]
    cu_q_dev: Tensor
    cu_k_dev: Tensor
    start_dev: Tensor
