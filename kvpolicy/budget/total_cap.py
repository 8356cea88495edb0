"""WG-KV's cap on a whole sequence."""

from __future__ import annotations

import attrs

from .._fields import MOST_INT, fraction, integer
from .._knob import Knob
from .._names import named
from ._base import Budget, BudgetView, Counts


@named
@attrs.frozen
class TotalCap(Budget):
    """A cap on the global tokens of a sequence over all heads and layers (WG-KV's form).

    While more than `tokens` are stored, rounds drop `floor(drop * length)` tokens of every head,
    the lowest scores first (EMCLab-Sinica/WG-KV, `snapkv_max_cached_tokens`,
    `snapkv_evict_ratio`).
    """

    tokens: int = attrs.field(validator=integer(1, MOST_INT))
    drop: float = attrs.field(default=0.1, validator=fraction(low_open=True))

    @property
    def shares_heads(self) -> bool:
        return True

    @property
    def pools_heads(self) -> bool:
        return False

    @property
    def spans_layers(self) -> bool:
        return True

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        raise TypeError("TotalCap counts over all heads and layers and has no budget per head")

    def targets(self, view: BudgetView) -> Counts:
        return [self.lengths(counts) for counts in view.counts]

    def lengths(self, counts: list[list[int]]) -> list[list[int]]:
        """Tokens `[layer][head]` of one sequence after as many rounds as the cap asks for."""
        counts = [list(layer) for layer in counts]
        while sum(map(sum, counts)) > self.tokens:
            after = [[n - int(self.drop * n) for n in layer] for layer in counts]
            if after == counts:  # every head is shorter than 1 / drop
                after = [[max(n - 1, 0) for n in layer] for layer in counts]
            counts = after
        return counts

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Budget]:
        most = seen * layers * kv_heads
        return Knob(
            name="budget",
            at=lambda x: round(1 + (most - 1) * x),
            set=lambda value: attrs.evolve(self, tokens=int(value)),
        )
