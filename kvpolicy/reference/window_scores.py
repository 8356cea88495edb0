"""SnapKV's scores: what the last queries attended to, straight from pages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import POSITION_MASK, Heads, Pages, Ring, ring_slot

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
) -> Tensor:
    """Scores `[B, Hkv, M * P]` by the weights of the last queries: `Ops.window_scores`.

    Keys are read twice, a chunk at a time: for each query's log-sum-exp, then for its weights.
    """
    table, counts = heads
    batch, kv_heads, _, dim = ring.k.shape
    width = table.shape[2] * pages.k.shape[1]
    at = lengths[:, None] - observation + torch.arange(observation, device=lengths.device)
    q = _in_ring(queries, at).unflatten(1, (kv_heads, -1))  # [B, Hkv, G, w, D]
    wide = torch.promote_types(q.dtype, torch.float32)
    at = at[:, None, None, :, None]

    def logits(keys: Tensor, seen: Tensor) -> Tensor:
        found = (q @ keys[:, :, None].transpose(3, 4)).to(wide) * scale
        return found.masked_fill(~seen, float("-inf"))

    chunk = max(_LOGITS // (q.numel() // dim), 1)
    parts = [logits(k, ok & (where <= at)).logsumexp(-1) for k, where, ok in
             _chunks(pages, table, counts, chunk)]  # fmt: skip
    if normalize == "visible":
        where = lengths[:, None] - window + torch.arange(window, device=at.device)
        near = where[:, None, None, None]
        parts.append(logits(_in_ring(ring.k, where), (near >= 0) & (near <= at)).logsumexp(-1))
    total = torch.stack(parts).logsumexp(0) if parts else q.new_zeros(q.shape[:4], dtype=wide)
    # A query that saw no key, such as one before the first, weighs nothing.
    total = total.masked_fill(~(total > float("-inf")), float("inf"))[..., None]
    seen = lengths.clamp(min=1, max=observation)[:, None, None]
    mass = torch.zeros(batch, kv_heads, width, dtype=wide, device=q.device)
    start = 0
    for k, where, ok in _chunks(pages, table, counts, chunk):
        weights = (logits(k, ok & (where <= at)) - total).exp().nan_to_num(0.0)
        if group == "max" and normalize == "global":
            part = weights.amax(2).sum(2)
        else:
            part = weights.sum(3)
            part = part.amax(2) if group == "max" else part.mean(2)
        mass[..., start : start + k.shape[2]] = part / seen
        start += k.shape[2]
    if not width:  # pooling refuses to pool nothing
        return mass
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(mass, kernel, 1, kernel // 2)


def _in_ring(ring: Tensor, at: Tensor) -> Tensor:
    """Entries of positions `at` `[B, n]` in a ring `[B, H, slots, D]`: `[B, H, n, D]`."""
    slot = ring_slot(at, ring.shape[2])[:, None, :, None]
    return ring.gather(2, slot.expand(-1, ring.shape[1], -1, ring.shape[3]))


def _chunks(
    pages: Pages, table: Tensor, counts: Tensor, tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys `[B, Hkv, n, D]`, positions and validity `[B, Hkv, 1, 1, n]`, about `tokens` at once."""
    size = pages.k.shape[1]
    for first in range(0, table.shape[2], max(tokens // size, 1)):
        ids = table[:, :, first : first + max(tokens // size, 1)].long()
        token = first * size + torch.arange(ids.shape[2] * size, device=ids.device)
        where = (pages.meta[ids] & POSITION_MASK).flatten(2)
        yield (
            pages.k[ids].flatten(2, 3),
            where[:, :, None, None],
            (token < counts[..., None])[:, :, None, None],
        )
