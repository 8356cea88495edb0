"""Eviction: which stored tokens are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, get_args

import attrs
import torch
from torch import Tensor

from .._fields import one_of
from .._knob import Knob
from .._names import named
from .._option import option
from ..admission import Admission, Write
from ..budget import Budget, budget_knob, budget_of, check_budget
from ..choices import Accumulates, NumberGroup, When
from ..ops import Heads, Ops, Pages, Ring
from ..rope import Rope

WHEN: tuple[When, ...] = get_args(When)
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
    `[B, Hkv, N]`, `valid` `[B, Hkv, N]`, and `marked` (decisions taken when the token was written).
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
        return attrs.evolve(self, **found, heads=range(found["valid"].shape[1]), across=None)

    def _replace(self, **changes: Any) -> EvictionView:
        """A view with other values in the named places, as of a named tuple."""
        return attrs.evolve(self, **changes)

    def _asdict(self) -> dict[str, Any]:
        """All values by name, as of a named tuple."""
        named = {field.alias or field.name: field.name for field in attrs.fields(EvictionView)}
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


class Eviction(ABC):
    """Scores the global tokens of a layer; those beyond the budget are dropped, their pages freed.

    A subclass is a frozen value. The local window is never evicted.
    """

    @option
    def budget(self) -> Budget | int | None:
        """What stays: a budget, or tokens per KV head; None: whatever is not scored -inf."""
        return None

    @option
    def window(self) -> int | None:
        """The local window that it demands, in tokens; None: any."""
        return None

    @option
    def prefers_window(self) -> int | None:
        """The window to take where nothing demands one; None: the pipeline's default."""
        return None

    @option
    def when(self) -> When:
        """ "prompt_end": once, when a prompt has ended; "decode": also every `interval` decoded
        tokens while a head holds more than its budget."""
        return "prompt_end"

    @option
    def queries(self) -> int:
        """The number of recent queries that `score` wants in its view."""
        return 0

    @option
    def needs(self) -> frozenset[str]:
        """Extra inputs of `mark` and `admit`, as for an admission."""
        return frozenset()

    @option
    def query_stats(self) -> bool:
        """Whether `score` wants `query_stats` in its view. A layer then holds, per sequence and
        query head, `D * (D + 1)` numbers of 4 bytes and the last 320 queries and twice the rollback
        depth."""
        return False

    @option
    def query_skip(self) -> int:
        """First tokens of a sequence whose queries do not count in `query_stats`."""
        return 0

    @option
    def hidden(self) -> int:
        """The number of last attention inputs that `score` wants in its view; a layer holds them,
        and `rollback` more, in the cache's dtype."""
        return 0

    @option
    def output_weight(self) -> bool:
        """Whether `score` wants the output projection in its view. Nothing is held: a quantised or
        offloaded one is made while a layer is scored."""
        return False

    @option
    def rope(self) -> bool:
        """Whether `score` wants to know how the layer turns queries and keys by position."""
        return False

    @option
    def neutral(self) -> bool:
        """Whether nothing is ever evicted."""
        return False

    @option
    def admission(self) -> Admission | None:
        """The admission whose decisions `mark` gives, None without one; for plans of memory."""
        return None

    @option
    def forgets_window(self) -> bool:
        """Whether unmarked tokens still in the window at the prompt's end go when they leave it."""
        return False

    @option
    def across_heads(self) -> bool:
        """Whether a token's score depends on other heads; a tensor-parallel rank has few."""
        return False

    @option
    def gathers_heads(self) -> bool:
        """Whether a score that depends on other heads asks for all of them, by `view.across` or
        `view.whole`, so that ranks may share them."""
        return False

    @option
    def numbered(self) -> bool:
        """Whether `number` gives each token a number to store beside it.

        Every number costs 4 bytes a stored token and KV head, the ring's slots included.
        """
        return False

    @option
    def accumulates(self) -> Accumulates | None:
        """What reading makes of a token's number: the "sum" or the "max" of the attention weights
        that queries give it, over all that a head holds, a selection or not; None: nothing.

        Queries of prompts and decoded tokens count once, and those that are taken back do not.
        Costs `rollback` queries a sequence, and two passes over the keys for each query.
        """
        return None

    @option
    def group(self) -> NumberGroup:
        """How the weights of a KV head's query heads are combined before they are accumulated."""
        return "mean"

    @option
    def replayed(self) -> bool:
        """Whether only the queries of `CachePipeline.replay` accumulate."""
        return False

    @option
    def remembers(self) -> bool:
        """Whether the scores of an eviction that drops tokens become the numbers of those that
        stay."""
        return False

    @abstractmethod
    def score(self, view: EvictionView) -> Tensor:
        """Scores `[B, Hkv, N]` of the global tokens; higher stays, -inf always goes."""

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        """What `score` says of the tokens stored; an op may say so without copying them."""
        return self.score(stored.view())

    def mark(self, write: Write) -> Tensor | None:
        """A decision bool `[Hkv, T]` to store with a prompt's new tokens, or None."""
        return None

    def admit(self, write: Write) -> Tensor | None:
        """Which generated tokens outlive the window, bool `[Hkv, T]`; None: all that the admission
        admits. Under the rules of an admission's `admit`."""
        return None

    def number(self, write: Write) -> Tensor | None:
        """Numbers `[Hkv, T]`, floats, to store with new tokens if `numbered`; None: 0.

        Under the rules of an admission's `admit`: stateless, causal and per token.
        """
        return None

    def at(self, layer: int) -> Eviction:
        """The policy of one layer."""
        return self

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:  # noqa: B027
        """Raises ValueError if the policy does not fit a model with these sizes."""

    def check_window(self, window: int) -> None:
        """Raises ValueError if the policy cannot keep a window of so many tokens."""
        check_budget(self, window)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Eviction:
        """The same policy with its tensors on `device`; called once per cache."""
        return self

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        """The number that decides how much stays of a text of `seen` tokens, for calibration.

        The default turns the field `budget`; None: there is none.
        """
        policy: Any = self
        budget = budget_of(policy)
        if budget is None or not attrs.has(type(policy)):
            return None
        if "budget" not in attrs.fields_dict(type(policy)):
            return None
        sizes = {"window": window, "seen": seen, "layers": layers, "kv_heads": kv_heads}
        return budget_knob(budget, **sizes).map(lambda found: attrs.evolve(policy, budget=found))


@named
@attrs.frozen(kw_only=True)
class KeepAll(Eviction):
    """Evicts nothing: the neutral eviction."""

    @property
    def neutral(self) -> bool:
        return True

    def score(self, view: EvictionView) -> Tensor:
        return torch.zeros_like(view.valid, dtype=torch.float32)


def when_field(default: When = "prompt_end") -> Any:
    """When an eviction acts."""
    return attrs.field(default=default, validator=one_of(*WHEN))


def wide(x: Tensor) -> torch.dtype:
    """The dtype that scores of `x` are computed in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
