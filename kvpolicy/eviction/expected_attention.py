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
        rope, dim = view.rope, mean.shape[-1]
        if rope is None:
            return mean * view.scale, None if square is None else square * (view.scale**2 / 2)

        def turns() -> tuple[Tensor, Tensor]:
            turn = rope.mean_matrix(view.lengths, self.future, dim).to(mean.dtype) * view.scale
            return turn, turn / 2

        turn, half = view.once(("turn", rope, self.future, dim, view.scale, mean.dtype), turns)
        if square is not None:
            # C is symmetric, so (C T)' is T'C: one product of all heads' rows each.
            square = (square.flatten(1, 2) @ half).view_as(square)
            square = (square.mT.flatten(1, 2) @ turn).view_as(square)
        return mean @ turn, square

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
        recent = near.shape[2]
        hidden = view.once(
            ("hidden", recent, self.sinks), lambda: ~_counts(view, recent, self.sinks)[:, None]
        )
        near = near.masked_fill_(hidden, float("-inf"))
        first = view.positions < self.sinks
        apart = (view.valid <= first)[:, :, None]  # the sinks, and where no token is
        found = logits.new_zeros(view.valid.shape)
        kv_heads = found.shape[1]
        for row, used in enumerate(view.used):
            both = torch.cat([logits[row, :, :used], near[row]], -1).unflatten(0, (kv_heads, -1))
            both[..., :used].masked_fill_(apart[row, ..., :used], float("-inf"))
            weights = both.softmax(-1)[..., :used].nan_to_num(0.0).mean(1)
            if self.epsilon and norms is not None:
                weights += self.epsilon
            found[row, :, :used] = weights if norms is None else weights * norms[row, :, :used]
        return found.masked_fill_(first, FIRST)


def _counts(view: EvictionView, recent: int, sinks: int) -> Tensor:
    """Which of the window's tokens are there and no sinks, bool `[B, W]`."""
    at = view.lengths[:, None] - recent + torch.arange(recent, device=view.lengths.device)
    return view.recent_valid & (at >= sinks)


def _logits(keys: Tensor, mean: Tensor, square: Tensor | None) -> Tensor:
    """m.k + k'Ck `[B, Hq, N]` of keys `[B, Hkv, N, D]`."""
    kv_heads, keys = keys.shape[1], keys.to(mean.dtype)
    mean = mean.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, D]
    if square is None:
        return (mean @ keys.mT).flatten(1, 2)
    keys = keys[:, :, None]
    products = keys @ square.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, N, D]
    found: Tensor = products.add_(mean[..., None, :]).mul_(keys).sum(-1).flatten(1, 2)
    return found
