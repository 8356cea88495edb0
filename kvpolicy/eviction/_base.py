"""Eviction: which stored tokens are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, get_args

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

WHEN: tuple[When, ...] = get_args(When)


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

    def _replace(self, **changes: Any) -> EvictionView:
        """A view with other values in the named places, as of a named tuple."""
        return attrs.evolve(self, **changes)

    def _asdict(self) -> dict[str, Any]:
        """All values by name, as of a named tuple."""
        names = (field.alias or field.name for field in attrs.fields(EvictionView))
        return {name: getattr(self, name) for name in names}


def _tensor(given: Tensor | Callable[[], Tensor]) -> Tensor:
    return given if isinstance(given, Tensor) else given()


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
