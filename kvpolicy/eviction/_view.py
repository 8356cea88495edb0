"""What an eviction sees of a layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import attrs
import torch
from torch import Tensor

from ..ops import Heads, Ops, Pages, Ring, pages_of
from ..rope import Rope

Given = TypeVar("Given")


class QueryStats(NamedTuple):
    """What the queries of each sequence were before RoPE, over all of its tokens that count.

    `tokens` `[B]` int64 of them, `mean` `[B, Hq, D]` and `covariance` `[B, Hq, D, D]` (divided by
    `tokens`) in float32 at least; zeros where there are none.
    """

    tokens: Tensor
    mean: Tensor
    covariance: Tensor


@attrs.frozen(eq=False, slots=False)
class EvictionView:
    """What one layer of the cache stores, as an eviction sees it.

    Global tokens, padded to the longest head: `keys`, `values` `[B, Hkv, N, D]`, `positions`
    `[B, Hkv, N]`, `valid` `[B, Hkv, N]`, and `marked` (decisions taken when the token was written);
    `used` says of each sequence up to where any of its heads has some.
    Local window in position order: `recent_keys` `[B, Hkv, W, D]`, `recent_valid` `[B, W]`,
    ending at position `lengths - 1` in the last column. Where the eviction asks for `queries`:
    `queries` `[B, Hq, w, D]` (after RoPE) ending at the same position, `query_valid` `[B, w]`.
    `lengths` `[B]` counts the tokens seen; `scale` multiplies q.k; `softcap` bounds the product and
    `sinks` `[Hq]` are logits that join each softmax, where the model has them. Where the eviction
    asks for numbers (`numbered`, `accumulates`, `remembers`): those of the global tokens, `numbers`
    `[B, Hkv, N]`, and of the window's, `recent_numbers` `[B, Hkv, W]`, float32 (float64 in a cache
    of float64), 0 where not valid.

    Besides: `recent_values` `[B, Hkv, W, Dv]` beside `recent_keys`, `heads` the global ids of the
    KV heads present, `group` query heads for each, `layer` of the
    model's `layers`. And where the eviction asks for them: `query_stats`; the last attention inputs
    `hidden` `[B, w, hidden]`, zeros before the first, with `hidden_valid` `[B, w]`; the layer's
    output projection `output_weight` `[Hq, Dv, hidden]`; `rope`, how it turns queries and keys
    (None: it does not).

    What is copied may be given as a function that returns the tensor; it is called when a policy
    first asks, so that a cache copies only what is used.
    """

    layer: int
    _keys: Tensor | Callable[[], Tensor]
    _values: Tensor | Callable[[], Tensor]
    _positions: Tensor | Callable[[], Tensor]
    valid: Tensor
    _marked: Tensor | Callable[[], Tensor]
    _recent_keys: Tensor | Callable[[], Tensor]
    _recent_valid: Tensor | Callable[[], Tensor]
    lengths: Tensor
    scale: float
    _queries: Tensor | Callable[[], Tensor] | None = None
    _query_valid: Tensor | Callable[[], Tensor] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    _numbers: Tensor | Callable[[], Tensor] | None = None
    _recent_numbers: Tensor | Callable[[], Tensor] | None = None
    _recent_values: Tensor | Callable[[], Tensor] | None = None
    heads: range = attrs.field(
        default=attrs.Factory(lambda self: range(self.valid.shape[1]), takes_self=True)
    )
    _query_stats: QueryStats | Callable[[], QueryStats] | None = None
    hidden: Tensor | None = None
    hidden_valid: Tensor | None = None
    _output_weight: Tensor | Callable[[], Tensor] | None = None
    rope: Rope | None = None
    layers: int = 1
    group: int = 1
    _across: Callable[[Tensor], Tensor] | None = None
    _used: Sequence[int] | None = None
    _shared: dict[Any, tuple[Tensor, Any]] = attrs.field(factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Given]) -> Given:
        """`make()`, or what it gave for this key in another layer of the same round.

        For what depends on `lengths` and the key alone; nobody writes to it.
        """
        kept = self._shared.get(key)
        if kept is None or kept[0] is not self.lengths:
            kept = self._shared[key] = self.lengths, make()
        found: Given = kept[1]
        return found

    @cached_property
    def used(self) -> list[int]:
        """Waits for the device unless the cache knew."""
        if self._used is not None:
            return list(self._used)
        place = torch.arange(1, self.valid.shape[-1] + 1, device=self.valid.device)
        found: list[int] = (self.valid * place).amax((1, 2)).tolist() if len(place) else []
        return found or [0] * len(self.valid)

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

    @cached_property
    def recent_keys(self) -> Tensor:
        return _tensor(self._recent_keys)

    @cached_property
    def recent_valid(self) -> Tensor:
        return _tensor(self._recent_valid)

    @cached_property
    def queries(self) -> Tensor | None:
        return None if self._queries is None else _tensor(self._queries)

    @cached_property
    def query_valid(self) -> Tensor | None:
        return None if self._query_valid is None else _tensor(self._query_valid)

    @cached_property
    def numbers(self) -> Tensor | None:
        return None if self._numbers is None else _tensor(self._numbers)

    @cached_property
    def recent_numbers(self) -> Tensor | None:
        return None if self._recent_numbers is None else _tensor(self._recent_numbers)

    @cached_property
    def recent_values(self) -> Tensor:
        """Every cache gives them; a view made by hand may lack them."""
        return _given("recent_values", self._recent_values)

    @cached_property
    def query_stats(self) -> QueryStats:
        return _given("query_stats", self._query_stats)

    @cached_property
    def output_weight(self) -> Tensor:
        return _given("output_weight", self._output_weight)

    def across(self, x: Tensor) -> Tensor:
        """`x` `[B, H, ...]` of the KV or query heads here, of all heads of the model, in order.

        Where ranks share the heads, every one must ask, with one shape.
        """
        return x if self._across is None else self._across(x)

    def whole(self) -> EvictionView:
        """This view with all heads of the model; what was here are its `heads`."""
        if self._across is None:
            return self
        named = ("keys", "values", "positions", "valid", "marked", "recent_keys", "queries",
                 "numbers", "recent_numbers", "recent_values")  # fmt: skip
        given = {field.alias or field.name: field.name for field in attrs.fields(EvictionView)}
        found: dict[str, Any] = {
            name: self.across(getattr(self, name))
            for name in named
            if getattr(self, given[name]) is not None
        }
        if self.sinks is not None:
            found["sinks"] = self.across(self.sinks[None])[0]
        if self._query_stats is not None:
            tokens, *moments = self.query_stats
            found["query_stats"] = QueryStats(tokens, *map(self.across, moments))
        if self._output_weight is not None:
            found["output_weight"] = self.across(self.output_weight[None])[0]
        everywhere = range(found["valid"].shape[1])
        return attrs.evolve(self, **found, heads=everywhere, across=None, used=None)

    def _replace(self, **changes: Any) -> EvictionView:
        """A view with other values in the named places, as of a named tuple."""
        if "valid" in changes:
            changes = {"used": None} | changes
        return attrs.evolve(self, **changes)

    def _asdict(self) -> dict[str, Any]:
        """All values by name, as of a named tuple."""
        named = {field.alias or field.name: field.name for field in attrs.fields(EvictionView)}
        del named["shared"]
        return {
            name: None if getattr(self, field) is None else getattr(self, name)
            for name, field in named.items()
        }


def _tensor(given: Tensor | Callable[[], Tensor]) -> Tensor:
    return given if isinstance(given, Tensor) else given()


def _given(name: str, value: Given | Callable[[], Given] | None) -> Given:
    if value is None:
        raise ValueError(f"{name}: this view has none; an eviction asks by `{name} = True`")
    return value() if callable(value) else value


class StoredTokens(NamedTuple):
    """What one layer of the cache stores, as an op reads it; see `kvpolicy.ops`.

    `heads` names the pages in use of every head; `queries` `[B, Hq, S', D]` is the ring of recent
    queries where the eviction asks for them, `lengths` `[B]` the tokens seen; `softcap` and `sinks`
    as in `EvictionView`. `view` makes the same an `EvictionView`.
    """

    pages: Pages
    heads: Heads
    ring: Ring
    queries: Tensor | None
    lengths: Tensor
    window: int
    scale: float
    softcap: float | None
    sinks: Tensor | None
    view: Callable[[], EvictionView]

    def read(self, ops: Ops, row: int, heads: slice, tokens: slice) -> tuple[Tensor, Tensor]:
        """Keys `[H, n, D]` and values `[H, n, Dv]` of global tokens of a sequence's `heads`.

        A copy, for what no op computes from pages: of a part at a time; zeros where a head holds no
        token.
        """
        size = self.pages.k.shape[1]
        columns = slice(tokens.start // size, pages_of(tokens.stop, size))
        k, v, _ = ops.read_pages(self.pages, self.heads.table[row, heads, columns].contiguous())
        first = columns.start * size
        token = torch.arange(first, first + k.shape[1] * size, device=k.device)
        hide = (token >= self.heads.counts[row, heads, None])[..., None]
        wanted = slice(tokens.start - first, tokens.stop - first)
        k, v = (x.flatten(1, 2).masked_fill_(hide, 0)[:, wanted] for x in (k, v))
        return k, v
