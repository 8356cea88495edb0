"""Expected Attention: keep what future queries are expected to look at."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import flag, not_negative, number, positive
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens

FIRST = torch.finfo(torch.float32).max  # the score of a token that stays in any case


@named
@attrs.frozen(kw_only=True)
class ExpectedAttention(Eviction):
    """Scores tokens by the weight that a normal distribution of queries would give them.

    With the mean m and covariance C of a sequence's queries before RoPE, turned by the mean
    rotation of the next `future` positions, a key has the logit s m.k + s^2 k'Ck / 2 (s the model's
    scale). The score is the softmax of these over all keys but the sinks', the mean over a group's
    query heads, plus `epsilon`, times `|v|` with `value_norm`. The first `sinks` tokens stay, and
    their queries do not count. Without `covariance` the second term is left out; a model's softcap
    always is.

    Devoto et al., 2025, Expected Attention (NVIDIA/kvpress, expected_attention_press.py, which
    takes queries of the prompt alone; here generated ones count as well). Kept sets are those of
    kvpress with a window of 1, the default.

    Example:
        `CachePipeline(eviction=ExpectedAttention(budget=Ratio(0.5)))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()
    future: int = attrs.field(default=512, validator=positive)
    sinks: int = attrs.field(default=4, validator=not_negative)
    covariance: bool = attrs.field(default=True, validator=flag)
    value_norm: bool = attrs.field(default=True, validator=flag)
    epsilon: float = attrs.field(default=0.0, validator=number("at least 0", lambda x: x >= 0))

    @property
    def prefers_window(self) -> int:
        return 1

    @property
    def query_stats(self) -> bool:
        return True

    @property
    def query_skip(self) -> int:
        return self.sinks

    @property
    def rope(self) -> bool:
        return True

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        view = stored.view()
        mean, square = self.future_queries(view)
        logits = ops.expected_logits(stored.pages, stored.heads, mean, square)
        norms = None
        if self.value_norm:
            norms = ops.value_norms(stored.pages, stored.heads)
        return self._scores(view, mean, square, logits, norms)

    def score(self, view: EvictionView) -> Tensor:
        mean, square = self.future_queries(view)
        norms = None
        if self.value_norm:
            norms = torch.linalg.vector_norm(view.values, dim=-1, dtype=wide(view.values))
        return self._scores(view, mean, square, _logits(view.keys, mean, square), norms)

    def future_queries(self, view: EvictionView) -> tuple[Tensor, Tensor | None]:
        """Mean `[B, Hq, D]` times the scale, and covariance `[B, Hq, D, D]` times half its square.

        Of the queries at the next positions.
        """
        _, mean, covariance = view.query_stats
        square = covariance if self.covariance else None
        if view.rope is not None:
            turn = view.rope.mean_matrix(view.lengths, self.future, mean.shape[-1]).to(mean.dtype)
            mean = mean @ turn
            if square is not None:
                square = turn.mT[:, None] @ square @ turn[:, None]
        return mean * view.scale, None if square is None else square * (view.scale**2 / 2)

    def _scores(
        self,
        view: EvictionView,
        mean: Tensor,
        square: Tensor | None,
        logits: Tensor,
        norms: Tensor | None,
    ) -> Tensor:
        """From `logits` `[B, Hq, N]` and `norms` `[B, Hkv, N]` of the stored tokens.

        Sequence by sequence, as long as each is: how a sum is rounded depends on its length.
        """
        near = _logits(view.recent_keys, mean, square)
        recent = view.recent_keys.shape[2]
        at = view.lengths[:, None] - recent + torch.arange(recent, device=view.lengths.device)
        near = near.masked_fill(~(view.recent_valid & (at >= self.sinks))[:, None], float("-inf"))
        first = view.positions < self.sinks
        found = logits.new_zeros(view.valid.shape)
        kv_heads = found.shape[1]
        for row, used in enumerate(view.used):
            counts = view.valid[row, :, :used] & ~first[row, :, :used]
            far = logits[row, :, :used].unflatten(0, (kv_heads, -1))
            far = far.masked_fill(~counts[:, None], float("-inf"))
            both = torch.cat([far, near[row].unflatten(0, (kv_heads, -1))], -1)
            weights = both.softmax(-1)[..., :used].nan_to_num(0.0).mean(1)
            if norms is not None:
                weights = (weights + self.epsilon) * norms[row, :, :used]
            found[row, :, :used] = weights
        return found.masked_fill(first, FIRST)


def _logits(keys: Tensor, mean: Tensor, square: Tensor | None) -> Tensor:
    """m.k + k'Ck `[B, Hq, N]` of keys `[B, Hkv, N, D]`."""
    kv_heads = keys.shape[1]
    keys = keys.to(mean.dtype)[:, :, None]  # [B, Hkv, 1, N, D]
    mean = mean.unflatten(1, (kv_heads, -1))
    found = (keys @ mean[..., None]).squeeze(-1)
    if square is not None:
        found = found + ((keys @ square.unflatten(1, (kv_heads, -1))) * keys).sum(-1)
    return found.flatten(1, 2)
