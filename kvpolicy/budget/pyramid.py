"""PyramidKV: early layers hold more."""

from __future__ import annotations

import attrs

from .._fields import not_negative, number
from .._names import named
from ._base import Budget, BudgetView, Counts
from ._wrapper import Wrapper


@named
@attrs.frozen
class Pyramid(Wrapper):
    """PyramidKV: early layers hold more, late layers less, `base` on average.

    The tokens beyond the observation fall linearly from the first to the last layer, which holds
    `1 / beta` of the mean: the line of the authors' code (Zefan-Cai/KVCache-Factory,
    pyramidkv_utils.py; beta 20), which rounds its steps down and so holds a little more
    than `base`. NVIDIA/kvpress has another line. A layer keeps at least the window.
    """

    beta: float = attrs.field(
        default=20.0, validator=number("a number of at least 1", lambda x: x >= 1)
    )
    observation: int = attrs.field(default=32, validator=not_negative)

    def allowed(self, seen: int, window: int, layer: int, layers: int) -> int:
        return Budget.allowed(self, seen, window, layer, layers)

    def targets(self, view: BudgetView) -> Counts:
        return Budget.targets(self, view)

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        mean = self.base.tokens_per_head(seen, layer, layers) - self.observation
        room = seen - self.observation
        if layers == 1 or mean <= 0:
            return mean + self.observation
        low = mean / self.beta
        high = 2 * mean - low
        if high >= room:
            high, low = room, 2 * mean - room
        if not high >= low >= 0:
            return mean + self.observation
        return round(high - layer * (high - low) / (layers - 1)) + self.observation
