"""What policies are given: new tokens, and what one layer of the cache stores."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import attrs
from torch import Tensor


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
