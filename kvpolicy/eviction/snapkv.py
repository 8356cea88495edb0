"""SnapKV: keep what the last queries attended to."""

from __future__ import annotations

from typing import Any, get_args

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import one_of, positive
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import HeadGroup, Normalize, Pooling, When
from ..ops import Ops
from ._base import Eviction, EvictionView, StoredTokens, when_field


def _odd(instance: SnapKV, attribute: attrs.Attribute[Any], value: int) -> None:
    positive(instance, attribute, value)
    if value % 2 == 0:
        raise ValueError(f"{attribute.name}: wanted an odd number, got {value}; write {value + 1}")


@attrs.frozen(kw_only=True)
class SnapKV(Eviction):
    """Scores tokens by the attention of the last `observation` queries, pooled over neighbours.

    Softmax weights of those queries over the stored keys (causal; `normalize="global"` leaves the
    window's keys out, as WG-KV's decode-time form does), averaged over queries, combined over the
    group's query heads by `group` and pooled along stored tokens with an odd `kernel`.
    FasterDecoding/SnapKV pools per query head with "avg" or "max"; a store per KV head needs a
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
    kernel: int = attrs.field(default=5, validator=_odd)
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
            group=self.group, normalize=self.normalize,
        )  # fmt: skip

    def score(self, view: EvictionView) -> Tensor:
        weights = self._weights(view)  # [B, Hkv, G, w, N]
        seen = view.query_valid.sum(-1).clamp(min=1)[:, None, None, None]  # type: ignore[union-attr]
        if self.group == "max" and self.normalize == "global":
            mass = weights.amax(2).sum(2) / seen[:, 0]  # WG-KV: max over the group, then the mean
        else:
            mass = weights.sum(3) / seen
            mass = mass.amax(2) if self.group == "max" else mass.mean(2)
        mass = mass.masked_fill(~view.valid, 0.0)
        if mass.shape[-1] == 0:  # pooling refuses to pool nothing
            return mass
        half = self.kernel // 2
        if self.pooling == "avg":
            return F.avg_pool1d(mass, self.kernel, 1, half)
        return F.max_pool1d(mass, self.kernel, 1, half)

    def _weights(self, view: EvictionView) -> Tensor:
        assert view.queries is not None and view.query_valid is not None
        batch, kv_heads, length, dim = view.keys.shape
        w = view.queries.shape[2]
        q = view.queries.view(batch, kv_heads, -1, w, dim)
        wide = torch.promote_types(q.dtype, torch.float32)
        at = view.lengths[:, None] - w + torch.arange(w, device=q.device)  # query positions [B, w]
        at = at[:, None, None, :, None]
        logits = (q @ view.keys[:, :, None].transpose(3, 4)).to(wide) * view.scale
        ok = view.valid[:, :, None, None] & (view.positions[:, :, None, None] <= at)
        if self.normalize == "visible":
            recent = view.recent_keys.shape[2]
            near = (q @ view.recent_keys[:, :, None].transpose(3, 4)).to(wide) * view.scale
            key_at = view.lengths[:, None] - recent + torch.arange(recent, device=q.device)
            near_ok = view.recent_valid[:, None, None, None] & (key_at[:, None, None, None] <= at)
            logits = torch.cat([logits, near], -1)
            ok = torch.cat([ok, near_ok.expand(-1, kv_heads, 1, -1, -1)], -1)
        logits = logits.masked_fill(~ok, float("-inf"))
        # A query without any key gives NaN, and a query not yet seen gives nothing.
        weights = logits.softmax(-1).nan_to_num(0.0)[..., :length]
        return weights * view.query_valid[:, None, None, :, None]
