"""Eviction: which stored tokens are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, get_args

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
from ..ops import Ops
from ._view import EvictionView, StoredTokens

WHEN: tuple[When, ...] = get_args(When)


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


def best(scores: Tensor, valid: Tensor, amount: Tensor) -> Tensor:
    """The `amount` `[...]` best valid tokens of each head `[..., N]`, ties to the later one.

    As `Ops.keep_best`, for scores above -inf of a view, which comes without ops.
    """
    worst = scores.masked_fill(~valid, float("-inf")).flip(-1)
    order = worst.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    return (rank < amount[..., None]).flip(-1) & valid
