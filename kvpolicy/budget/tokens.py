"""A number of tokens, or a fraction of those seen."""

from __future__ import annotations

from typing import cast

import attrs

from .._fields import fraction, positive
from .._knob import Knob
from .._names import named
from ._base import Budget


@named
@attrs.frozen
class Tokens(Budget):
    """`tokens` per KV head."""

    tokens: int = attrs.field(validator=positive)

    @property
    def fixed(self) -> int:
        return self.tokens

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return self.tokens

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Budget]:
        least = window + 1
        return Knob(
            name="budget",
            at=lambda x: round(least + (max(seen, least) - least) * x),
            set=lambda value: Tokens(int(value)),
        )


@named
@attrs.frozen
class Ratio(Budget):
    """A fraction of the real tokens seen, and at least the window."""

    ratio: float = attrs.field(validator=fraction(low_open=True))

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return int(self.ratio * seen)

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Budget]:
        low = min((window + 1) / seen, 1.0)
        return Knob(name="budget", at=lambda x: low + (1.0 - low) * x, set=Ratio)


def tokens_from_int(value: Budget | int) -> Budget:
    """An int becomes Tokens; anything else is left to the validator."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Tokens(value)
    return cast(Budget, value)
