"""A budget that changes another one."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
from torch import Tensor

from .._fields import number
from .._knob import Knob
from ._base import Budget, BudgetView, Counts, KeepBest, is_budget
from .tokens import tokens_from_int


def _per_head(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    is_budget(instance, attribute, value)
    if value.spans_layers:
        raise TypeError(
            f"{attribute.alias}: wanted a budget per head, got {value}; write Tokens(n) or Ratio(x)"
        )


def _base() -> Any:
    return attrs.field(converter=tokens_from_int, validator=_per_head)


@attrs.frozen
class Wrapper(Budget):
    """A budget that changes another one, its `base`."""

    base: Budget = _base()

    @property
    def shares_heads(self) -> bool:
        return self.base.shares_heads

    @property
    def pools_heads(self) -> bool:
        return self.base.pools_heads

    @property
    def spans_layers(self) -> bool:
        return self.base.spans_layers

    @property
    def reads_scores(self) -> bool:
        return self.base.reads_scores

    def check(self, window: int) -> None:
        self.base.check(window)

    def check_model(self, layers: int, kv_heads: int) -> None:
        self.base.check_model(layers, kv_heads)

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return self.base.tokens_per_head(seen, layer, layers)

    def allowed(self, seen: int, window: int, layer: int, layers: int) -> int:
        return self.base.allowed(seen, window, layer, layers)

    def targets(self, view: BudgetView) -> Counts:
        return self.base.targets(view)

    def keep(
        self, scores: Tensor, valid: Tensor, target: Tensor, window: int, best: KeepBest
    ) -> Tensor:
        return self.base.keep(scores, valid, target, window, best)

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Budget]:
        sizes = {"window": window, "seen": seen, "layers": layers, "kv_heads": kv_heads}
        return budget_knob(self.base, **sizes).map(lambda base: attrs.evolve(self, base=base))


@attrs.frozen
class Scaled(Wrapper):
    """`factor` times the tokens that `base` leaves, window included: what calibration turns."""

    base: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    factor: float = attrs.field(
        default=1.0, validator=number("a number of at least 0", lambda x: 0 <= x < 2**31)
    )

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return round(self.factor * self.base.tokens_per_head(seen, layer, layers))

    def allowed(self, seen: int, window: int, layer: int, layers: int) -> int:
        return self._scaled(self.base.allowed(seen, window, layer, layers), window)

    def targets(self, view: BudgetView) -> Counts:
        found = self.base.targets(view)
        return [[[self._scaled(n, view.window) for n in heads] for heads in row] for row in found]

    def _scaled(self, tokens: int, window: int) -> int:
        return max(round(self.factor * (tokens + window)) - window, 0)


def budget_knob(
    budget: Budget, *, window: int, seen: int, layers: int, kv_heads: int
) -> Knob[Budget]:
    """A budget's own knob, else a factor on what it leaves."""
    own = budget.knob(window=window, seen=seen, layers=layers, kv_heads=kv_heads)
    if own is not None:
        return own
    least = min(budget.allowed(seen, window, layer, layers) for layer in range(layers))
    most = seen / (least + window)
    return Knob(name="budget's factor", at=lambda x: x * most, set=partial(Scaled, budget))
