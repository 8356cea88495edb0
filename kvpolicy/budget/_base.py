"""The base of budgets, and what they are told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import attrs
from torch import Tensor

from .._fields import MOST, shown
from .._knob import Knob
from .._option import option

KeepBest = Callable[[Tensor, Tensor, Tensor], Tensor]
Counts = list[list[list[int]]]  # [row][layer][head]


@attrs.frozen(kw_only=True, eq=False, slots=False)
class BudgetView:
    """What a budget is told when an eviction comes, of the layers that it binds.

    `seen[row]` real tokens of each sequence, the local `window` in tokens, `layers` the indices of
    the layers, `of` all layers of the model, `kv_heads[i]` the KV heads of the i-th one here (of
    all ranks for a budget with `shares_heads`).
    `counts[row][i][head]` are the global tokens stored now; the device is asked for them when a
    budget first asks. `scores[i]` `[B, Hkv, N]` are the eviction's of the i-th layer, -inf where no
    token is, for a budget with `reads_scores`.
    """

    seen: tuple[int, ...]
    window: int
    layers: tuple[int, ...]
    of: int
    kv_heads: tuple[int, ...]
    _counts: Callable[[], Counts]
    _scores: tuple[Tensor, ...] | None = None

    @cached_property
    def counts(self) -> Counts:
        return self._counts()

    @property
    def scores(self) -> tuple[Tensor, ...]:
        if self._scores is None:
            raise ValueError("scores: this view has none; a budget asks by `reads_scores = True`")
        return self._scores


class Budget(ABC):
    """Tells an eviction how many global tokens of a head stay, and which.

    A subclass is a frozen value with `tokens_per_head`. One that counts in another way has a
    `targets` of its own; one that does not simply keep the best of each head has a `keep` of its
    own.
    """

    @option
    def shares_heads(self) -> bool:
        """Whether what a KV head keeps depends on other heads; a tensor-parallel rank has few."""
        return False

    @option
    def pools_heads(self) -> bool:
        """Whether `keep` compares tokens of different heads; by default where heads share."""
        return self.shares_heads

    @option
    def spans_layers(self) -> bool:
        """Whether layers share tokens, so that it cannot hold for some of them only."""
        return False

    @option
    def reads_scores(self) -> bool:
        """Whether `targets` reads the scores of all layers; they are then held together, 4 bytes a
        token, head and layer."""
        return False

    @option
    def fixed(self) -> int | None:
        """Tokens per head, window included, if they are the same at any length; else None."""
        return None

    @abstractmethod
    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        """Mean tokens per KV head, window included, after `seen` real tokens."""

    def check(self, window: int) -> None:
        """Raises ValueError if the budget cannot hold a window of so many tokens at any length."""
        if self.fixed is not None and self.fixed < window + 1:
            raise ValueError(
                f"budget: wanted at least window + 1 = {window + 1} tokens (budgets include the "
                f"window), got {self.fixed}"
            )

    def check_model(self, layers: int, kv_heads: int) -> None:  # noqa: B027
        """Raises ValueError if the budget does not fit a model with these sizes."""

    def allowed(self, seen: int, window: int, layer: int, layers: int) -> int:
        """Mean global tokens per head; the window is kept even where it is more than the budget."""
        return max(self.tokens_per_head(seen, layer, layers) - window, 0)

    def floored(self, seen: int, window: int, layer: int, layers: int) -> bool:
        """Whether the budget is less than the window, which is kept all the same."""
        return not self.spans_layers and self.tokens_per_head(seen, layer, layers) < min(
            seen, window
        )

    def targets(self, view: BudgetView) -> Counts:
        """Global tokens `[row][layer][head]` that should be left; more than are stored is fine."""
        return [
            [
                [self.allowed(seen, view.window, layer, view.of)] * heads
                for layer, heads in zip(view.layers, view.kv_heads, strict=True)
            ]
            for seen in view.seen
        ]

    def keep(
        self, scores: Tensor, valid: Tensor, target: Tensor, window: int, best: KeepBest
    ) -> Tensor:
        """The tokens of a layer that stay, bool `[B, Hkv, N]`.

        `scores`, `valid` `[B, Hkv, N]`; `target` `[B, Hkv]` global tokens. `best(scores, valid,
        amount)` marks the `amount` `[...]` best valid ones of `[..., N]`, ties to the later token.
        """
        return best(scores, valid, target)

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Budget] | None:
        """The number that makes the cache of a text of `seen` tokens larger or smaller.

        None: calibration turns a factor on what the budget leaves.
        """
        return None


def is_budget(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """A Budget."""
    if not isinstance(value, Budget):
        raise TypeError(f"{attribute.alias}: {not_a_budget(value)}")


def not_a_budget(value: Any) -> str:
    """What is wrong with a value, and the budget that it probably means."""
    write = "Tokens(1024) for tokens per KV head, or Ratio(0.5) for a part of those seen"
    if isinstance(value, type) and issubclass(value, Budget):
        write = f"{value.__name__}(...)"
    elif isinstance(value, float) and 0 < value <= 1:
        write = f"Ratio({value}) for this part of the tokens seen"
    elif isinstance(value, float) and value.is_integer() and 1 < value <= MOST:
        write = f"Tokens({int(value)})"
    return f"wanted a budget, got {shown(value)}; write {write}"
