"""CapKV: keep the values that span most of what queries may read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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

_NUMBERS = 1 << 24  # float64 that a product of a part of the values has
_EVEN = 256  # parts are so many tokens or a multiple of it: whole pages
Values = Callable[[int, slice], Tensor]  # of tokens of a sequence: `[Hkv, n, Dv]`


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
        def values(row: int, part: slice) -> Tensor:
            return stored.read(ops, row, slice(None), part)[1]

        view = stored.view()
        anchor = self._anchor(view)
        dots = ops.expected_logits(stored.pages, stored.heads, anchor, None)
        norms = ops.key_norms(stored.pages, stored.heads)
        return self._scores(view, anchor, dots, norms, values)

    def score(self, view: EvictionView) -> Tensor:
        def values(row: int, part: slice) -> Tensor:
            return view.values[row, :, part]

        anchor = self._anchor(view)
        dots, norms = _products(view.keys, anchor)
        return self._scores(view, anchor, dots, norms, values)

    def _anchor(self, view: EvictionView) -> Tensor:
        """Directions `[B, Hq, D]` of the mean queries at the next positions."""
        mean, rope = view.query_stats.mean, view.rope
        if rope is not None:
            dim, dtype = mean.shape[-1], mean.dtype
            mean = mean @ view.once(
                ("mean turn", rope, self.future, dim, dtype),
                lambda: rope.mean_matrix(view.lengths, self.future, dim).to(dtype),
            )
        return F.normalize(mean, dim=-1)

    def _scores(
        self, view: EvictionView, anchor: Tensor, dots: Tensor, norms: Tensor, values: Values
    ) -> Tensor:
        """From products `[B, Hq, N]` with the stored keys and these keys' norms `[B, Hkv, N]`."""
        found = torch.zeros(view.valid.shape, dtype=wide(dots), device=dots.device)
        recent = view.recent_keys.shape[2]
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
            if used:
                read = partial(values, row)
                found[row, :, :used] = _leverage(far, near[row], own[row], read, self.epsilon)
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
    far: Tensor, near: Tensor, own: Tensor, values: Callable[[slice], Tensor], epsilon: float
) -> Tensor:
    """Scores `[Hkv, n]` of n stored tokens, of logits `[Hkv, G, n]` and the window's `[Hkv, G, W]`.

    `own` `[Hkv, W, Dv]` are the window's values. A token whose logit is -inf counts for nothing.
    """
    most = torch.cat([far, near], -1).amax(-1, keepdim=True)
    far, near = ((x - most).exp().nan_to_num(0.0) for x in (far, near))
    (kv_heads, group, count), dim = far.shape, own.shape[2]
    size = max(_NUMBERS // (kv_heads * group * dim) // _EVEN, 1) * _EVEN
    parts = [slice(n, min(n + size, count)) for n in range(0, count, size)]
    one = torch.eye(dim, dtype=own.dtype, device=own.device).expand(kv_heads, group, dim, dim)
    gram = one.clone(memory_format=torch.contiguous_format).flatten(1, 2)  # [Hkv, G * Dv, Dv]
    held, recent = (torch.where(x > 0, x + epsilon, 0).mT.contiguous() for x in (far, near))
    for weights, part in zip(recent.split(size, 1), own.split(size, 1), strict=True):
        _add_outer(gram, weights, part)
    for part in parts:
        _add_outer(gram, held[:, part], values(part).double())
    # A sum of 1 and products of values with themselves has a factor: no look at what went wrong.
    factor = torch.linalg.cholesky_ex(gram.view_as(one)).L
    inverse = torch.linalg.solve_triangular(factor, one, upper=False).flatten(1, 2)
    norms = torch.empty_like(far)
    for part in parts:
        solved = (inverse @ values(part).double().mT).unflatten(1, (group, dim))
        norms[..., part] = torch.linalg.vector_norm(solved, dim=2)
    return norms.square_().mul_(far).mean(1)


def _add_outer(gram: Tensor, weights: Tensor, values: Tensor) -> None:
    """Adds sums of w v v' to `gram` `[Hkv, G * Dv, Dv]`.

    Of weights `[Hkv, n, G]` and values `[Hkv, n, Dv]`.
    """
    weighed = (weights[..., None] * values[:, :, None]).flatten(2)  # [Hkv, n, G * Dv]
    gram.baddbmm_(weighed.mT, values)
