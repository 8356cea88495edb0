"""Admitted keys of a prompt call at their true positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, POSITION_MASK, Bounds, Heads, Pages, Segments, tile_spans
from .page_io import read_pages


def keys_at(
    key: Tensor,
    flags: Tensor,
    segments: Segments,
    pages: Pages,
    heads: Heads,
    tile: int,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys `[Hkv, N, D]` by position and whether there is one `[Hkv, N]`: `Ops.keys_at`."""
    kv_heads, _, dim = key.shape
    spans = [stop * tile for _, stop in tile_spans(segments, tile)]
    keys = key.new_zeros(kv_heads, sum(spans), dim)
    present = torch.zeros(kv_heads, sum(spans), dtype=torch.bool, device=key.device)
    base = 0
    for row, span in enumerate(spans):
        k0, k1 = segments.cu_k[row : row + 2]
        end = segments.start[row] + segments.cu_q[row + 1] - segments.cu_q[row]
        if not span:
            continue
        counts = heads.counts[row].tolist() if bounds is None else bounds.most[row]
        used = -(-max(counts, default=0) // pages.k.shape[1])
        if used:
            k, _, meta = read_pages(pages, heads.table[row, :, :used])
            at = (meta & POSITION_MASK).flatten(1).long()
            for h in range(kv_heads):
                count = int(heads.counts[row, h])
                keys[h, base + at[h, :count]] = k[h].flatten(0, 1)[:count]
                present[h, base + at[h, :count]] = True
        near = slice(base + end - (k1 - k0), base + end)
        there = (flags[:, k0:k1] & ADMITTED) > 0
        present[:, near] = there
        keys[:, near] = key[:, k0:k1].masked_fill(~there[..., None], 0)
        base += span
    return keys, present
