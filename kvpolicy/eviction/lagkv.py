"""LagKV: keep what stands out from the tokens that follow it."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import flag, integer, not_negative
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops, whole_lags
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class LagKV(Eviction):
    """Scores tokens by how far their key and value lie outside the range of the next partition's.

    Liang et al., 2025 (AI-Lab-China-Merchants-Bank/LagKV; NVIDIA/kvpress, lagkv_press.py). After
    the first `sinks` tokens a head's tokens form partitions of `lag`. In each, x' = (x - min) /
    (max - min) with the next partition's smallest and largest value of every channel; a token's
    score is the softmax over its partition of the standard deviation of x' over channels, the mean
    of that of keys and values. Partitions lose equally, since a token counts by its rank in its
    own; with `cross_scoring` by the score itself. Sinks and the last partition, with what follows
    it, stay as long as the budget has room; a head of less than two partitions keeps the newest.

    Example:
        `CachePipeline(eviction=LagKV(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    sinks: int = attrs.field(default=4, validator=not_negative)
    lag: int = attrs.field(default=128, validator=integer(2))
    cross_scoring: bool = attrs.field(default=False, validator=flag)
    when: When = when_field()

    @property
    def prefers_window(self) -> int:
        return 1

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        given = stored.pages, stored.heads, stored.ring, stored.lengths, stored.window
        key, value = (
            ops.lag_spreads(*given, sinks=self.sinks, lag=self.lag, values=x) for x in (False, True)
        )
        return self._scores(stored.view(), key, value)

    def score(self, view: EvictionView) -> Tensor:
        counts = view.valid.sum(-1, keepdim=True)
        length = view.valid.shape[-1] + view.recent_valid.shape[-1] - self.sinks
        parts = whole_lags(length, self.lag)
        key = self._spread(view.keys, view.recent_keys, view, counts, parts)
        value = self._spread(view.values, view.recent_values, view, counts, parts)
        return self._scores(view, key, value)

    def _scores(self, view: EvictionView, key: Tensor, value: Tensor) -> Tensor:
        """From spreads `[B, Hkv, parts, lag]`."""
        counts = view.valid.sum(-1, keepdim=True)
        total = counts + view.recent_valid.sum(-1)[:, None, None]  # [B, Hkv, 1]
        place = torch.arange(view.valid.shape[-1], device=counts.device)
        after = (total - self.sinks).clamp(min=0)  # tokens that form partitions
        scored = self._ranks(key, value, len(place))
        last = self.sinks + (after // self.lag - 1) * self.lag
        scored = scored.masked_fill((place < self.sinks) | (place >= last), 1.0)
        newest = ((place - self.sinks) / after.clamp(min=1)).to(scored)
        newest = newest.masked_fill(place < self.sinks, 1.0)
        return torch.where(after < 2 * self.lag, newest, scored)

    def _ranks(self, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Scores `[B, Hkv, length]` within each partition that another one follows.

        Those of other tokens are any.
        """
        scores = (key.softmax(-1) + value.softmax(-1)) / 2  # [B, Hkv, parts, lag]
        if not self.cross_scoring:
            order = scores.argsort(dim=-1, stable=True)
            place = torch.arange(self.lag, device=order.device).expand_as(order)
            scores = torch.empty_like(scores).scatter_(-1, order, (place / self.lag).to(scores))
        scores = scores.flatten(2)
        return F.pad(scores, (self.sinks, max(length - scores.shape[2], 0)))[..., :length]

    def _spread(
        self, far: Tensor, near: Tensor, view: EvictionView, counts: Tensor, parts: int
    ) -> Tensor:
        """How far keys or values `[B, Hkv, N, D]` lie outside the next partition's range."""
        if not parts:
            return far.new_zeros(*far.shape[:2], 0, self.lag, dtype=wide(far))
        x = _joined(far, near, view, counts, self.sinks + (parts + 1) * self.lag)
        x = x[:, :, self.sinks :].unflatten(2, (parts + 1, self.lag))
        low, high = x.amin(3, keepdim=True)[:, :, 1:], x.amax(3, keepdim=True)[:, :, 1:]
        apart = (high - low).masked_fill(high == low, 1.0)  # a channel that is one number
        found: Tensor = ((x[:, :, :-1] - low) / apart).std(-1)
        return found


def _joined(far: Tensor, near: Tensor, view: EvictionView, counts: Tensor, length: int) -> Tensor:
    """The global tokens of each head and the window's behind them, `[B, Hkv, length, D]`."""
    batch, heads, used, dim = far.shape
    # With a place for what is none.
    x = far.new_zeros(batch, heads, max(length, used) + 1, dim, dtype=wide(far))
    x[:, :, :used] = far.to(x)
    seen = view.recent_valid[:, None]
    at = counts + seen.long().cumsum(-1) - 1
    at = at.masked_fill(~seen | (at > length), length)[..., None].expand(-1, -1, -1, dim)
    return x.scatter(2, at, near.to(x))[:, :, :length]
