"""SAGE-KV: one choice at the prompt's end by what the last token looks at."""

from __future__ import annotations

from typing import get_args

import attrs
import torch
from torch import Tensor

from .._fields import not_negative, one_of
from .._names import named
from ..admission import Write
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import HeadGroup
from ..ops import Ops
from ._base import Eviction
from ._view import EvictionView, StoredTokens
from .snapkv import SnapKV


@named
@attrs.frozen(kw_only=True)
class SageKV(Eviction):
    """Keeps the first `sinks` tokens and the best by the last query's attention, once.

    Wang et al., 2025, LLMs Know What to Drop (arXiv 2503.08879; no code was published). At the
    prompt's end a head holds its sinks, the tokens of largest softmax weight and the local window;
    from then on the window slides: a token that leaves it is gone, as the paper's recent window
    does, so that the cache never grows. `group` combines the weights of a KV head's query heads.

    Example:
        `CachePipeline(eviction=SageKV(budget=2048), window=1024)`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    sinks: int = attrs.field(default=4, validator=not_negative)
    group: HeadGroup = attrs.field(default="max", validator=one_of(*get_args(HeadGroup)))
    forgets_window = True

    @property
    def queries(self) -> int:
        return 1

    def mark(self, write: Write) -> Tensor:
        """What outlives the window if it is in it when the prompt ends."""
        return (write.positions < self.sinks).expand(write.key.shape[0], -1)

    def admit(self, write: Write) -> Tensor:
        return self.mark(write)

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        return self._with_sinks(self._last.scores(ops, stored), stored.view())

    def score(self, view: EvictionView) -> Tensor:
        return self._with_sinks(self._last.score(view), view)

    @property
    def _last(self) -> SnapKV:
        """The same weights, which an op reads from pages."""
        return SnapKV(budget=self.budget, observation=1, kernel=1, group=self.group)

    def _with_sinks(self, weights: Tensor, view: EvictionView) -> Tensor:
        return torch.where(view.positions < self.sinks, 2.0, weights)  # no weight is above 1
