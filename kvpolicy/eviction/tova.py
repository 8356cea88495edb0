"""TOVA: keep what the newest query attends to."""

from __future__ import annotations

from typing import get_args

import attrs
from torch import Tensor

from .._fields import flag, one_of
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import HeadGroup, When
from ..ops import Ops
from ._base import Eviction, when_field
from ._view import EvictionView, StoredTokens
from .snapkv import SnapKV


@named
@attrs.frozen(kw_only=True)
class TOVA(Eviction):
    """Scores tokens by the softmax weight that the newest query gives them.

    Oren et al., 2024 (schwartz-lab-NLP/TOVA, src/tova_cache.py; NVIDIA/kvpress, tova_press.py).
    Weights are combined over the query heads of a KV head by `group`. The paper takes the mean
    over all heads of a layer and keeps one set for all of them: `across_heads=True`, where a head
    that does not hold a token counts as weight 0. The newest token itself always stays, as in
    kvpress. The paper evicts at every step: `attach(..., interval=1)`.

    Example:
        `CachePipeline(eviction=TOVA(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    group: HeadGroup = attrs.field(default="mean", validator=one_of(*get_args(HeadGroup)))
    across_heads: bool = attrs.field(default=False, validator=flag)
    gathers_heads = True
    when: When = when_field("decode")

    @property
    def queries(self) -> int:
        return 1

    @property
    def prefers_window(self) -> int:
        return 1

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        scores = self._newest.scores(ops, stored)
        return self._shared(scores, stored.view()) if self.across_heads else scores

    def score(self, view: EvictionView) -> Tensor:
        scores = self._newest.score(view)
        return self._shared(scores, view) if self.across_heads else scores

    @property
    def _newest(self) -> SnapKV:
        """The same weights, which an op reads from pages."""
        return SnapKV(budget=self.budget, observation=1, kernel=1, group=self.group)

    def _shared(self, scores: Tensor, view: EvictionView) -> Tensor:
        """The mean over heads of the weights `[B, Hkv, N]` that tokens of a position have."""
        batch, heads, _ = scores.shape
        end = int(view.lengths.max())
        at = view.positions.masked_fill(~view.valid, end)
        spread = scores.new_zeros(batch, heads, end + 1).scatter(2, at, scores)
        # One head after the other: the order of a sum over them must not depend on the device.
        every = view.across(spread)
        total = sum(every.unbind(1), scores.new_zeros(())) / every.shape[1]
        return total[:, None].expand_as(spread).gather(2, at)
