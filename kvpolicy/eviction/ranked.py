"""Any gate that scores tokens, as an eviction with a budget."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from .._fields import is_a, not_negative
from .._names import named
from ..admission import Admission, Write
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ._base import Eviction, when_field
from ._view import EvictionView


def _scores(instance: Ranked, attribute: attrs.Attribute[Any], value: Any) -> None:
    is_a(Admission, "an admission")(instance, attribute, value)
    if not callable(getattr(value, "scores", None)):
        raise ValueError(
            f"{attribute.name}: wanted an admission that scores tokens, such as KVzap or "
            f"WriteGate, got {type(value).__name__}"
        )


@named
@attrs.frozen(kw_only=True)
class Ranked(Eviction):
    """Keeps the tokens that `gate` scores highest, whatever its threshold.

    The score of a token is computed once, when it is written: `gate.scores(write)`. With `KVzap`
    this is kvpress's KVzapPress with a compression ratio (NVIDIA/kvpress, kvzap_press.py), with a
    `WriteGate` the gate of WG-KV under a budget. The first `sinks` tokens always stay. A gate's
    window is preferred, not demanded.

    Example:
        `CachePipeline(eviction=Ranked(gate=KVzap.from_pretrained(path), budget=Ratio(0.3)))`
    """

    gate: Any = attrs.field(validator=_scores)
    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()
    sinks: int = attrs.field(default=0, validator=not_negative)
    numbered = True

    @property
    def needs(self) -> frozenset[str]:
        found: frozenset[str] = self.gate.needs
        return found

    @property
    def prefers_window(self) -> int | None:
        found: int | None = self.gate.window
        return found

    def number(self, write: Write) -> Tensor:
        found: Tensor = self.gate.scores(write)
        return found

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        best = torch.finfo(view.numbers.dtype).max
        return torch.where(view.positions < self.sinks, best, view.numbers)

    def at(self, layer: int) -> Eviction:
        return attrs.evolve(self, gate=self.gate.at(layer))

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.gate.check(layers, kv_heads, head_dim)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Eviction:
        return attrs.evolve(self, gate=self.gate.place(device, dtype, backend))
