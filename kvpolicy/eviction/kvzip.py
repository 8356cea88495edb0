"""KVzip: keep what a model looked at while it repeated its context."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import not_negative
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import Accumulates, NumberGroup
from ._base import Eviction
from ._view import EvictionView


@named
@attrs.frozen(kw_only=True)
class KVzip(Eviction):
    """Keeps the tokens that are needed to repeat the context, whatever will be asked.

    The score of a token is the largest softmax weight that any query of any head of its group gave
    it while the model was told to repeat the part of the context that it lies in (Kim et al. 2025,
    arXiv 2505.23416; snu-mllab/KVzip, attention/score.py; kvpress, presses/kvzip_press.py). Those
    passes are `CachePipeline.replay`, or `attached.replay`, before the prompt ends; without them
    the end of the prompt raises PhaseError. The first `sinks` tokens always stay: give the replays
    the same number. The original lets all heads of all layers share its budget, which is
    `AcrossLayers(Ratio(0.3), floor=0)`; with tokens or a ratio every head keeps as many. Where
    nothing demands a window it is 1 token wide, since the original has none.

    Example:
        `CachePipeline(eviction=KVzip(budget=Ratio(0.3)))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    sinks: int = attrs.field(default=4, validator=not_negative)

    @property
    def prefers_window(self) -> int:
        return 1

    @property
    def accumulates(self) -> Accumulates:
        return "max"

    @property
    def group(self) -> NumberGroup:
        return "max"

    @property
    def replayed(self) -> bool:
        return True

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        # No weight is more than 1.
        return torch.where(view.positions < self.sinks, 2.0, view.numbers)
