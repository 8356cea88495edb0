"""Budgets: how many tokens a KV head may hold, the local window included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

from ._fields import MOST, MOST_INT, fraction, integer, not_negative, number, positive, shown
from .backend import load

KeepBest = Callable[[Tensor, Tensor, Tensor], Tensor]


class Budget(ABC):
    """Tells an eviction which global tokens of a layer stay."""

    @abstractmethod
    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        """Mean tokens per KV head, window included, after `seen` real tokens."""

    def keep(self, scores: Tensor, valid: Tensor, allowed: Tensor) -> Tensor:
        """The tokens that stay, bool `[B, Hkv, N]`.

        `scores`, `valid` `[B, Hkv, N]`; `allowed` `[B]` global tokens per head. Ties keep the later
        token.
        """
        return self._choose(load("reference").keep_best, scores, valid, allowed)

    def keep_by(self, best: KeepBest, scores: Tensor, valid: Tensor, allowed: Tensor) -> Tensor:
        """`keep` by a backend's `keep_best`, unless the budget has a `keep` of its own."""
        if type(self).keep is not Budget.keep:
            return self.keep(scores, valid, allowed)
        return self._choose(best, scores, valid, allowed)

    def _choose(self, best: KeepBest, scores: Tensor, valid: Tensor, allowed: Tensor) -> Tensor:
        return best(scores, valid, allowed[:, None].expand(valid.shape[:2]))

    def allowed(self, seen: int, window: int, layer: int, layers: int) -> int:
        """Mean global tokens per head; raises ValueError if the budget cannot hold the window."""
        total = self.tokens_per_head(seen, layer, layers)
        if seen > window and total < window + 1:
            raise ValueError(
                f"budget: {self} is {total} tokens per head in layer {layer} after {seen} tokens; "
                f"wanted at least window + 1 = {window + 1}"
            )
        return max(total - window, 0)


def is_budget(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """A Budget."""
    if not isinstance(value, Budget):
        raise TypeError(
            f"{attribute.alias}: wanted a budget, got {shown(value)}; write {_instead(value)}"
        )


def _instead(value: Any) -> str:
    """The budget that a wrong value probably means."""
    if isinstance(value, type) and issubclass(value, Budget):
        return f"{value.__name__}(...)"
    if isinstance(value, float) and 0 < value <= 1:
        return f"Ratio({value}) for this part of the tokens seen"
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= MOST:
        return f"Tokens({int(value)})"
    return "Tokens(1024) for tokens per KV head, or Ratio(0.5) for a part of those seen"


def _per_head(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    is_budget(instance, attribute, value)
    if isinstance(value, TotalCap):
        raise TypeError(
            f"{attribute.alias}: wanted a budget per head, got {value}; write Tokens(n) or Ratio(x)"
        )


@attrs.frozen
class Tokens(Budget):
    """`tokens` per KV head."""

    tokens: int = attrs.field(validator=positive)

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return self.tokens


@attrs.frozen
class Ratio(Budget):
    """A fraction of the real tokens seen."""

    ratio: float = attrs.field(validator=fraction(low_open=True))

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return int(self.ratio * seen)


@attrs.frozen
class Adaptive(Budget):
    """AdaKV's split of a layer's tokens: the best scores of all heads together, with a floor.

    Each head keeps its best `int(floor * share)` global tokens; the rest of `base` times the number
    of heads goes to the best remaining ones of the layer (NVIDIA/kvpress, adakv_press.py; floor
    0.2).
    """

    base: Budget = attrs.field(validator=_per_head)
    floor: float = attrs.field(default=0.2, validator=fraction())

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return self.base.tokens_per_head(seen, layer, layers)

    def _choose(self, best: KeepBest, scores: Tensor, valid: Tensor, allowed: Tensor) -> Tensor:
        batch, heads, length = scores.shape
        floor = (self.floor * allowed.double()).long()  # int(), as Python rounds it
        sure = best(scores, valid, floor[:, None].expand(-1, heads))
        pooled = scores.masked_fill(sure, float("inf")).reshape(batch, 1, heads * length)
        total = allowed[:, None] * heads
        kept = best(pooled, valid.reshape(batch, 1, heads * length), total)
        return kept.view(batch, heads, length)


@attrs.frozen
class Pyramid(Budget):
    """PyramidKV: early layers hold more, late layers less, `base` on average.

    The tokens beyond the observation fall linearly from the first to the last layer, which holds
    `1 / beta` of the mean (NVIDIA/kvpress, pyramidkv_press.py; beta 20).
    """

    base: Budget = attrs.field(validator=_per_head)
    beta: float = attrs.field(
        default=20.0, validator=number("a number of at least 1", lambda x: x >= 1)
    )
    observation: int = attrs.field(default=32, validator=not_negative)

    def _choose(self, best: KeepBest, scores: Tensor, valid: Tensor, allowed: Tensor) -> Tensor:
        return self.base.keep_by(best, scores, valid, allowed)

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


@attrs.frozen
class TotalCap(Budget):
    """A cap on the global tokens of a sequence over all heads and layers (WG-KV's form).

    While more than `tokens` are stored, rounds drop `floor(drop * length)` tokens of every head,
    the lowest scores first (EMCLab-Sinica/WG-KV, `snapkv_max_cached_tokens`,
    `snapkv_evict_ratio`).
    """

    tokens: int = attrs.field(validator=integer(1, MOST_INT))
    drop: float = attrs.field(default=0.1, validator=fraction(low_open=True))

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        raise TypeError("TotalCap counts over all heads and layers and has no budget per head")

    def allowed(self, seen: int, window: int, layer: int, layers: int) -> int:
        raise TypeError("TotalCap counts over all heads and layers and has no budget per head")

    def lengths(self, counts: list[list[int]]) -> list[list[int]]:
        """Tokens `[layer][head]` of one sequence after as many rounds as the cap asks for."""
        counts = [list(layer) for layer in counts]
        while sum(map(sum, counts)) > self.tokens:
            after = [[n - int(self.drop * n) for n in layer] for layer in counts]
            if after == counts:  # every head is shorter than 1 / drop
                after = [[max(n - 1, 0) for n in layer] for layer in counts]
            counts = after
        return counts


def tokens_from_int(value: Any) -> Any:
    """An int becomes Tokens; anything else is left to the validator."""
    return Tokens(value) if isinstance(value, int) and not isinstance(value, bool) else value
