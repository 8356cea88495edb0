"""CapKV: keep the values that span most of what queries may read."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import not_negative, number, positive
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens
from .expected_attention import FIRST

_TOKENS = 4096  # values of a head that are read at once, in whole pages
Values = Callable[[int, int, slice], Tensor]  # of tokens of a sequence and KV head: `[n, Dv]`


@named
@attrs.frozen(kw_only=True)
class CapKV(Eviction):
    """Scores tokens by their leverage among a head's values, weighed by how queries look at them.

    With q the mean of a sequence's queries before RoPE, turned by the mean rotation of the next
    `future` positions, a token has the weight w = exp(`tau` (cos(q, k) - the head's largest)) and
    the score w v'A^-1 v, the mean over a group's query heads, where A = 1 + the sum of
    (w + `epsilon`) v v' over the head's tokens. The first `sinks` tokens stay, and neither they nor
    their queries count.

    Tang et al., 2026, arXiv 2604.25975, in the form of NVIDIA/kvpress (cap_press.py), which
    normalizes q and k and turns q, where the paper has their product as it is. Kept sets are those
    of kvpress with a window of 1, the default. Besides the mean, the statistics that a cache keeps
    for it hold the queries' covariance, which is not read.

    Example:
        `CachePipeline(eviction=CapKV(budget=Ratio(0.5)))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()
    tau: float = attrs.field(default=5.0, validator=number("at least 0", lambda x: x >= 0))
    future: int = attrs.field(default=512, validator=positive)
    sinks: int = attrs.field(default=4, validator=not_negative)
    epsilon: float = attrs.field(default=1e-6, validator=number("at least 0", lambda x: x >= 0))
    query_stats = rope = True

    @property
    def prefers_window(self) -> int:
        return 1

    @property
    def query_skip(self) -> int:
        return self.sinks

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        def values(row: int, head: int, part: slice) -> Tensor:
            return stored.read(ops, row, slice(head, head + 1), part)[1][0]

        view = stored.view()
        anchor = self._anchor(view)
        dots = ops.expected_logits(stored.pages, stored.heads, anchor, None)
        norms = ops.key_norms(stored.pages, stored.heads)
        return self._scores(view, anchor, dots, norms, values)

    def score(self, view: EvictionView) -> Tensor:
        def values(row: int, head: int, part: slice) -> Tensor:
            return view.values[row, head, part]

        anchor = self._anchor(view)
        dots, norms = _products(view.keys, anchor)
        return self._scores(view, anchor, dots, norms, values)

    def _anchor(self, view: EvictionView) -> Tensor:
        """Directions `[B, Hq, D]` of the mean queries at the next positions."""
        mean = view.query_stats.mean
        if view.rope is not None:
            turn = view.rope.mean_matrix(view.lengths, self.future, mean.shape[-1])
            mean = mean @ turn.to(mean.dtype)
        return F.normalize(mean, dim=-1)

    def _scores(
        self, view: EvictionView, anchor: Tensor, dots: Tensor, norms: Tensor, values: Values
    ) -> Tensor:
        """From products `[B, Hq, N]` with the stored keys and these keys' norms `[B, Hkv, N]`."""
        found = torch.zeros(view.valid.shape, dtype=wide(dots), device=dots.device)
        recent, kv_heads = view.recent_keys.shape[2], found.shape[1]
        near = self._logits(*_products(view.recent_keys, anchor))  # [B, Hkv, G, W]
        at = view.lengths[:, None] - recent + torch.arange(recent, device=dots.device)
        counts = view.recent_valid & (at >= self.sinks)
        near = near.masked_fill(~counts[:, None, None], float("-inf"))
        own = view.recent_values.masked_fill(~counts[:, None, :, None], 0).double()
        first = view.positions < self.sinks
        held = view.valid & ~first
        for row, used in enumerate(view.used):
            far = self._logits(dots[row : row + 1, :, :used], norms[row : row + 1, :, :used])[0]
            far = far.masked_fill(~held[row, :, None, :used], float("-inf"))
            for head in range(kv_heads):
                if used:
                    both = far[head], near[row, head]
                    part = _leverage(*both, own[row, head], values, row, head, self.epsilon)
                    found[row, head, :used] = part.to(found.dtype)
        return found.masked_fill(first, FIRST)

    def _logits(self, dots: Tensor, norms: Tensor) -> Tensor:
        """`tau` times the cosines `[B, Hkv, G, N]`."""
        cosines = dots.unflatten(1, (norms.shape[1], -1)) / norms[:, :, None].clamp(min=1e-12)
        found: Tensor = self.tau * cosines.double().clamp(-1, 1)
        return found


def _products(keys: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Products `[B, Hq, N]` of keys `[B, Hkv, N, D]` with the anchors, and norms `[B, Hkv, N]`."""
    keys = keys.to(anchor.dtype)
    group = anchor.unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, D]
    return (group @ keys.mT).flatten(1, 2), torch.linalg.vector_norm(keys, dim=-1)


def _leverage(
    far: Tensor, near: Tensor, own: Tensor, values: Values, row: int, head: int, epsilon: float
) -> Tensor:
    """Scores `[n]` of a head's n stored tokens, of logits `[G, n]` and the window's `[G, W]`.

    `own` `[W, Dv]` are the window's values. A token whose logit is -inf counts for nothing.
    """
    most = torch.cat([far, near], -1).amax(-1, keepdim=True)
    far, near = ((x - most).exp().nan_to_num(0.0) for x in (far, near))
    parts = [slice(n, min(n + _TOKENS, far.shape[1])) for n in range(0, far.shape[1], _TOKENS)]

    def read(part: slice) -> Tensor:
        return values(row, head, part).double()

    gram = torch.eye(own.shape[1], dtype=own.dtype, device=own.device) + _outer(near, own, epsilon)
    for part in parts:
        gram = gram + _outer(far[:, part], read(part), epsilon)
    factor = torch.linalg.cholesky(gram)  # [G, Dv, Dv]
    found = []
    for part in parts:
        solved = torch.linalg.solve_triangular(factor, read(part).mT[None], upper=False)
        found.append((far[:, part] * solved.square().sum(1)).mean(0))
    return torch.cat(found)


def _outer(weights: Tensor, values: Tensor, epsilon: float) -> Tensor:
    """The sum of (w + epsilon) v v' `[G, Dv, Dv]`, of weights `[G, n]`; where w is 0, of none."""
    weights = torch.where(weights > 0, weights + epsilon, 0)
    return (values.mT * weights[:, None]) @ values
