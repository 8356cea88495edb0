"""SnapKV's scores: what the last queries attended to, straight from pages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import POSITION_MASK, Heads, Pages, Ring, check_asked, ring_slot
from ._logits import logits

_LOGITS = 1 << 22  # logits that a chunk of keys may have


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


def _mass(
    pages: Pages, heads: Heads, ring_k: Tensor, queries: Tensor, lengths: Tensor, window: int,
    scale: float, observation: int, group: str, normalize: str, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Weights `[1, Hkv, M * P]` of one sequence's tokens, before pooling.

    Keys are read twice, a chunk at a time: for each query's log-sum-exp, then for its weights.
    """
    kv_heads, dim = ring_k.shape[1], ring_k.shape[3]
    at = lengths[:, None] - observation + torch.arange(observation, device=lengths.device)
    q = _in_ring(queries, at).unflatten(1, (kv_heads, -1))  # [1, Hkv, G, w, D]
    wide = torch.promote_types(q.dtype, torch.float32)
    at = at[:, None, None, :, None]

    def seen_logits(keys: Tensor, seen: Tensor) -> Tensor:
        found = logits(q, keys[:, :, None], scale, softcap)
        return found.masked_fill_(~seen, float("-inf"))

    chunk = max(_LOGITS // (q.numel() // dim), 1)
    parts = [
        seen_logits(k, ok & (where <= at)).logsumexp(-1)
        for k, where, ok in _chunks(pages, heads, chunk)
    ]
    if normalize == "visible":
        where = lengths[:, None] - window + torch.arange(window, device=at.device)
        near = where[:, None, None, None]
        seen = (near >= 0) & (near <= at)
        parts.append(seen_logits(_in_ring(ring_k, where), seen).logsumexp(-1))
    if sinks is not None:
        parts.append(sinks.to(wide).view(1, kv_heads, -1, 1).expand(q.shape[:4]))
    total = torch.stack(parts).logsumexp(0) if parts else q.new_zeros(q.shape[:4], dtype=wide)
    # A query that saw no key, such as one before the first, weighs nothing.
    total = total.masked_fill(~(total > float("-inf")), float("inf"))[..., None]
    count = lengths.clamp(min=1, max=observation)[:, None, None]
    masses = [q.new_zeros(1, kv_heads, 0, dtype=wide)]
    for k, where, ok in _chunks(pages, heads, chunk):
        weights = (seen_logits(k, ok & (where <= at)) - total).exp().nan_to_num(0.0)
        if group == "max" and normalize == "global":
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
