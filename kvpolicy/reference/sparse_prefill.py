"""Attention of a prompt call: admitted tokens that left the window, and the band of recent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, POSITION_MASK, Bounds, Heads, Pages, Segments, check_asked
from ._logits import attend
from .page_io import read_pages

TILE = 256


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    pages: Pages,
    heads: Heads,
    window: int,
    scale: float,
    bounds: Bounds | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Attention over {j <= i : i - j < window or admitted[j]}: `Ops.prefill_attention`."""
    check_asked("prefill_attention", query.shape[0], softcap, sinks, chunk)
    table, counts = heads
    kv_heads, dim = key.shape[0], key.shape[2]
    shape = query.shape[1], query.shape[0], value.shape[2]
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    for row, start in enumerate(segments.start):
        q0, q1 = segments.cu_q[row : row + 2]
        k0, k1 = segments.cu_k[row : row + 2]
        if q0 == q1:
            continue
        first = start + (q1 - q0) - (k1 - k0)  # position of the row's first recent key
        longest = max(counts[row].tolist() if bounds is None else bounds.most[row], default=0)
        used = -(-longest // pages.k.shape[1])
        far_k, far_v, far_at = global_tokens(pages, table[row, :, :used], counts[row])
        for tile in range(start, start + q1 - q0, TILE):
            stop = min(tile + TILE, start + q1 - q0)
            band = max(tile - window + 1, first)
            at = torch.arange(band, stop, device=key.device)
            here = torch.arange(tile, stop, device=key.device)[:, None]
            near = slice(k0 + band - first, k0 + stop - first)
            keep = (flags[:, None, near] & ADMITTED) > 0
            seen = (at <= here) & ((here - at < window) | keep)
            before = far_at < tile - window + 1
            width = int(before.sum(-1).max()) if used else 0
            far = before[:, None, :width].expand(-1, stop - tile, -1)
            if chunk is not None:
                far = far & (far_at[:, None, :width] // chunk == here // chunk)
                seen = seen & (at // chunk == here // chunk)
            mask = torch.cat([far, seen.expand(kv_heads, -1, -1)], -1)
            k = torch.cat([far_k[:, :width], key[:, near]], 1)
            v = torch.cat([far_v[:, :width], value[:, near]], 1)
            q = query[:, q0 + tile - start : q0 + stop - start]
            group = q.shape[0] // kv_heads
            q = q.reshape(kv_heads, group * (stop - tile), dim)
            attended = attend(q, k, v, mask, scale, softcap, sinks)
            attended = attended.reshape(kv_heads * group, stop - tile, -1)
            out[q0 + tile - start : q0 + stop - start] = attended.transpose(0, 1)
    return out.transpose(0, 1)


def global_tokens(pages: Pages, table: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v `[Hkv, N, D]` and positions `[Hkv, N]` of one sequence, padded with a far position."""
    k, v, meta = read_pages(pages, table)
    at = (meta & POSITION_MASK).flatten(1)
    valid = torch.arange(at.shape[1], device=at.device) < counts[:, None]
    at = at.masked_fill(~valid, POSITION_MASK)
    return k.flatten(1, 2), v.flatten(1, 2), at
