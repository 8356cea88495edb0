"""SnapKV: keep what the last queries attended to."""

from __future__ import annotations

from typing import get_args

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import odd, one_of, positive
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import HeadGroup, Normalize, Pooling, When
from ..ops import Ops
from ._attention import attention
from ._base import Eviction, when_field
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class SnapKV(Eviction):
    """Scores tokens by the attention of the last `observation` queries, pooled over neighbours.

    Softmax weights of those queries over the stored keys (causal; `normalize="global"` leaves the
    window's keys out, as WG-KV's decode-time form does), averaged over queries, combined over the
    group's query heads by `group` and pooled along stored tokens by `pooling` ("avg" or "max")
    with an odd `kernel`. FasterDecoding/SnapKV pools per query head; a store per KV head needs a
    group rule: kvpress uses "mean", WG-KV "max".

    Where no policy demands a local window it is `observation` tokens wide, so that budgets and
    kept sets are those of the original and of kvpress: the observing tokens stay, and the best of
    all others. A wider window keeps more recent tokens and leaves fewer to the scores.

    Example:
        `CachePipeline(eviction=SnapKV(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()
    observation: int = attrs.field(default=32, validator=positive)
    kernel: int = attrs.field(default=5, validator=odd)
    pooling: Pooling = attrs.field(default="avg", validator=one_of(*get_args(Pooling)))
    group: HeadGroup = attrs.field(default="mean", validator=one_of(*get_args(HeadGroup)))
    normalize: Normalize = attrs.field(default="visible", validator=one_of(*get_args(Normalize)))

    @property
    def queries(self) -> int:
        return self.observation

    @property
    def prefers_window(self) -> int:
        return self.observation

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        assert stored.queries is not None
        return ops.window_scores(
            stored.pages, stored.heads, stored.ring, stored.queries, stored.lengths, stored.window,
            stored.scale, observation=self.observation, kernel=self.kernel, pooling=self.pooling,
            group=self.group, normalize=self.normalize, softcap=stored.softcap, sinks=stored.sinks,
        )  # fmt: skip

    def score(self, view: EvictionView) -> Tensor:
        # Sequence by sequence, as long as each is: how a product or a sum is rounded depends on
        # its length.
        batch, kv_heads, length = view.valid.shape
        wide = torch.promote_types(view.keys.dtype, torch.float32)
        mass = torch.zeros(batch, kv_heads, length, dtype=wide, device=view.valid.device)
        if mass.shape[-1] == 0:  # pooling refuses to pool nothing
            return mass
        for row, used in enumerate(view.used):
            mass[row, :, :used] = self._mass(view, row, used)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(mass, self.kernel, 1, self.kernel // 2)

    def _mass(self, view: EvictionView, row: int, used: int) -> Tensor:
        """Weights `[Hkv, used]` of a sequence's first `used` slots, before pooling."""
        near = self.normalize == "visible"
        weights = attention(view, row, used, near)[..., :used]  # [Hkv, G, w, used]
        seen = view.query_valid[row].sum().clamp(min=1)  # type: ignore[index]
        if self.group == "max" and self.normalize == "global":
            mass = weights.amax(1).sum(1) / seen  # WG-KV: max over the group, then the mean
        else:
            mass = weights.sum(2) / seen
            mass = mass.amax(1) if self.group == "max" else mass.mean(1)
        return mass.masked_fill(~view.valid[row, :, :used], 0.0)
