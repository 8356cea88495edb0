"""Dots of stored keys with a few vectors, and the sum of keys' directions, straight from pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Heads, Pages, Pairs
from ._heads import each_chunk


def key_dots(
    pages: Pages, heads: Heads, vectors: Tensor, sizes: Tensor | None = None,
    pairs: Pairs | None = None, *, unit: bool = False,
) -> Tensor:  # fmt: skip
    """Dots `[B, Hq, M * P]` of stored keys: `Ops.key_dots`."""
    batch, kv_heads, columns = heads.table.shape
    width = columns * pages.k.shape[1]
    found = vectors.new_zeros(batch, vectors.shape[1], width)
    grouped = found.unflatten(1, (kv_heads, -1))
    m = vectors.unflatten(1, (kv_heads, -1))
    s = None if sizes is None else sizes.unflatten(1, (kv_heads, -1))
    for row, head, low, own in each_chunk(pages.k, heads):
        keys = own.to(vectors.dtype)  # [n, D]
        out = m[row, head] @ keys.T
        if s is not None and pairs is not None:
            first = pairs.first + torch.arange(s.shape[3], device=keys.device) * pairs.step
            out = out + s[row, head] @ torch.hypot(keys[:, first], keys[:, first + pairs.gap]).T
        if unit:
            out = out / torch.linalg.vector_norm(keys, dim=-1).clamp(min=1e-8)
        grouped[row, head, :, low : low + len(keys)] = out
    return found


def key_directions(pages: Pages, heads: Heads) -> Tensor:
    """The sum of k / |k| of stored keys `[B, Hkv, D]`: `Ops.key_directions`."""
    dim, wide = pages.k.shape[2], torch.promote_types(pages.k.dtype, torch.float32)
    found = torch.zeros(*heads.counts.shape, dim, dtype=torch.float64, device=pages.k.device)
    for row, head, _, keys in each_chunk(pages.k, heads):
        found[row, head] += F.normalize(keys.to(wide), dim=-1).sum(0, dtype=torch.float64)
    return found
