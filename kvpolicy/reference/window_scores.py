"""SnapKV's scores: what the last queries attended to, straight from pages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import POSITION_MASK, Heads, Pages, Ring, check_asked, ring_slot
from ._logits import logits

_LOGITS = 1 << 18  # logits that a chunk of keys may have: little beside a layer's keys


def window_scores(
    pages: Pages,
    heads: Heads,
    ring: Ring,
    queries: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    *,
    observation: int,
    kernel: int,
    pooling: str,
    group: str,
    normalize: str,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores `[B, Hkv, M * P]` by the weights of the last queries: `Ops.window_scores`.

    Sequences are looked at one by one, as long as each is: how a product or a sum is rounded
    depends on its length.
    """
    check_asked("window_scores", queries.shape[1], softcap, sinks)
    size, (batch, kv_heads, columns) = pages.k.shape[1], heads.table.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    mass = torch.zeros(batch, kv_heads, columns * size, dtype=wide, device=queries.device)
    if not mass.numel():  # pooling refuses to pool nothing
        return mass
    for row, most in enumerate(heads.counts.amax(1).tolist()):
        used, own = -(-most // size), slice(row, row + 1)
        mass[own, :, : used * size] = _mass(
            pages, Heads(heads.table[own, :, :used], heads.counts[own]), ring.k[own],
            queries[own], lengths[own], window, scale, observation, group, normalize, softcap,
            sinks,
        )  # fmt: skip
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(mass, kernel, 1, kernel // 2)


def window_masses(
    pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor, window: int,
    scale: float, *, observation: int, squared: bool = False, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of weights `[B, Hkv, M * P]` and `[B, Hkv, window]`: `Ops.window_masses`."""
    check_asked("window_masses", queries.shape[1], softcap, sinks)
    size, wide = pages.k.shape[1], torch.promote_types(queries.dtype, torch.float32)
    kv_heads, columns = heads.table.shape[1:]
    found = queries.new_zeros(len(lengths), kv_heads, columns * size + window, dtype=wide)
    far, near = found.split([columns * size, window], -1)
    for row, most in enumerate(heads.counts.amax(1).tolist()):
        used, own = -(-most // size), slice(row, row + 1)
        seen = _Observed(
            pages, Heads(heads.table[own, :, :used], heads.counts[own]), ring.k[own], queries[own],
            lengths[own], window, scale, observation, softcap,
        )  # fmt: skip
        total, low = seen.levels(True, sinks)[..., None], 0
        for part in seen.chunks():
            mass = _sums(part, total, squared)
            far[own, :, low : low + mass.shape[2]] = mass
            low += mass.shape[2]
        near[own] = _sums(seen.recent(), total, squared)
    return far, near


def _sums(logits: Tensor, total: Tensor, squared: bool) -> Tensor:
    """Weights `[1, Hkv, n]`, or their squares, summed over a group's queries; spends the logits."""
    weights = logits.sub_(total).exp_().nan_to_num_(0.0)
    return (weights.square_() if squared else weights).sum((2, 3))


class _Observed:
    """The last queries of one sequence and what they see, a chunk of keys at a time."""

    def __init__(
        self, pages: Pages, heads: Heads, ring_k: Tensor, queries: Tensor, lengths: Tensor,
        window: int, scale: float, observation: int, softcap: float | None,
    ) -> None:  # fmt: skip
        at = lengths[:, None] - observation + torch.arange(observation, device=lengths.device)
        kv_heads, dim = ring_k.shape[1], ring_k.shape[3]
        self.q = _in_ring(queries, at).unflatten(1, (kv_heads, -1))  # [1, Hkv, G, w, D]
        self.at = at[:, None, None, :, None]
        self.chunk = max(_LOGITS // (self.q.numel() // dim), 1)
        self.pages, self.heads, self.ring_k = pages, heads, ring_k
        self.lengths, self.window = lengths, window
        self.scale, self.softcap = scale, softcap

    def chunks(self) -> Iterator[Tensor]:
        """Logits `[1, Hkv, G, w, n]` of stored keys, -inf of those that are not seen."""
        for keys, where, ok in _chunks(self.pages, self.heads, self.chunk):
            yield self._logits(keys, ok & (where <= self.at))

    def recent(self) -> Tensor:
        """Logits `[1, Hkv, G, w, W]` of the window's keys, -inf of those that are not seen."""
        where = (
            torch.arange(self.window, device=self.q.device) + self.lengths[:, None] - self.window
        )
        keys, where = _in_ring(self.ring_k, where), where[:, None, None, None]
        return self._logits(keys, (where >= 0) & (where <= self.at))

    def levels(self, near: bool, sinks: Tensor | None) -> Tensor:
        """Log-sum-exps `[1, Hkv, G, w]`; +inf, so that weights are 0, of one that saw no key."""
        q, wide = self.q, torch.promote_types(self.q.dtype, torch.float32)
        parts = [x.logsumexp(-1) for x in self.chunks()]
        if near:
            parts.append(self.recent().logsumexp(-1))
        if not parts:
            return q.new_full(q.shape[:4], float("inf"), dtype=wide)
        total = torch.stack(parts).logsumexp(0)
        seen = total > float("-inf")
        if sinks is not None:
            own = sinks.to(wide).view(1, q.shape[1], -1, 1).expand(q.shape[:4])
            total = torch.stack([*parts, own]).logsumexp(0)
        return total.masked_fill(~seen, float("inf"))

    def _logits(self, keys: Tensor, seen: Tensor) -> Tensor:
        # All queries of a group in one product, for which keys are not repeated.
        found = logits(self.q.flatten(2, 3), keys, self.scale, self.softcap)
        found = found.unflatten(2, self.q.shape[2:4])
        return found.masked_fill_(~seen, float("-inf"))


def _mass(
    pages: Pages, heads: Heads, ring_k: Tensor, queries: Tensor, lengths: Tensor, window: int,
    scale: float, observation: int, group: str, normalize: str, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Weights `[1, Hkv, M * P]` of one sequence's tokens, before pooling.

    Keys are read twice, a chunk at a time: for each query's log-sum-exp, then for its weights.
    """
    seen = _Observed(pages, heads, ring_k, queries, lengths, window, scale, observation, softcap)
    total = seen.levels(normalize == "visible", sinks)[..., None]
    count = lengths.clamp(min=1, max=observation)[:, None, None]
    masses = [total.new_zeros(1, ring_k.shape[1], 0)]
    for found in seen.chunks():
        weights = found.sub_(total).exp_().nan_to_num_(0.0)
        if group == "each" or (group == "max" and normalize == "global"):
            part = weights.amax(2).sum(2)
        else:
            part = weights.sum(3)
            part = part.amax(2) if group == "max" else part.mean(2)
        masses.append(part / count)
    return torch.cat(masses, -1)


def _in_ring(ring: Tensor, at: Tensor) -> Tensor:
    """Entries of positions `at` `[B, n]` in a ring `[B, H, slots, D]`: `[B, H, n, D]`."""
    slot = ring_slot(at, ring.shape[2])[:, None, :, None]
    return ring.gather(2, slot.expand(-1, ring.shape[1], -1, ring.shape[3]))


def _chunks(pages: Pages, heads: Heads, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys `[B, Hkv, n, D]`, positions and validity `[B, Hkv, 1, 1, n]`, about `tokens` at once."""
    size, (table, counts) = pages.k.shape[1], heads
    for first in range(0, table.shape[2], max(tokens // size, 1)):
        ids = table[:, :, first : first + max(tokens // size, 1)].long()
        token = first * size + torch.arange(ids.shape[2] * size, device=ids.device)
        where = (pages.meta[ids] & POSITION_MASK).flatten(2)
        yield (
            pages.k[ids].flatten(2, 3),
            where[:, :, None, None],
            (token < counts[..., None])[:, :, None, None],
        )
