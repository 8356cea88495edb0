"""G-KV: what the last queries look at, and what earlier ones did."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import fraction, positive
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops
from ._attention import attention
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class GKV(Eviction):
    """Keeps tokens by local and historical attention together.

    A round scores a token by s = max(`alpha` s', a): a is the softmax weight that the last
    `observation` queries give it, the largest of the group's heads, the mean over queries, divided
    by the largest of the head's tokens; s' is its score of the round before, which every token
    keeps (Liao et al. 2025, arXiv 2512.00504; microsoft/G-KV, gkv/model/compression/
    score_based.py with `smooth_method="max"`). The rounds of the original come every 128 tokens:
    `attach(..., interval=128)`. Where nothing demands a window it is `observation` tokens wide.

    Example:
        `CachePipeline(eviction=GKV(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field(default="decode")
    observation: int = attrs.field(default=16, validator=positive)
    alpha: float = attrs.field(default=0.8, validator=fraction())
    remembers = True

    @property
    def queries(self) -> int:
        return self.observation

    @property
    def prefers_window(self) -> int:
        return self.observation

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        assert stored.queries is not None
        local = ops.window_scores(
            stored.pages, stored.heads, stored.ring, stored.queries, stored.lengths, stored.window,
            stored.scale, observation=self.observation, kernel=1, pooling="avg", group="each",
            normalize="visible", softcap=stored.softcap, sinks=stored.sinks,
        )  # fmt: skip
        return self._with_history(local, stored.view())

    def score(self, view: EvictionView) -> Tensor:
        assert view.query_valid is not None
        found = torch.zeros(view.valid.shape, dtype=wide(view.keys), device=view.valid.device)
        for row, used in enumerate(view.used):
            seen = view.query_valid[row].sum().clamp(min=1)
            local = attention(view, row, used)[..., :used].amax(1).sum(1) / seen
            found[row, :, :used] = local.masked_fill(~view.valid[row, :, :used], 0)
        return self._with_history(found, view)

    def _with_history(self, local: Tensor, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        if local.shape[-1]:
            most = local.amax(-1, keepdim=True)
            local = local / torch.where(most > 0, most, 1)
        return torch.maximum(local, self.alpha * view.numbers.to(local))
