"""Attention of a prompt call over the window, and the blocks and columns that tiles chose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Bounds, Heads, Pages, Segments, TileReads, check_asked, tile_spans
from ._logits import attend
from .sparse_prefill import global_tokens


def selected_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    pages: Pages,
    heads: Heads,
    window: int,
    scale: float,
    reads: TileReads,
    bounds: Bounds | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention `[Hq, Tq, Dv]` over windows and what `reads` names: `Ops.selected_prefill`."""
    check_asked("selected_prefill", query.shape[0], softcap, sinks)
    kv_heads, query_heads = key.shape[0], query.shape[0]
    each, tile, nth = query_heads // kv_heads, reads.tile, 0
    blocks = _of_queries(reads.blocks, query_heads)
    columns = None if reads.columns is None else _of_queries(reads.columns, query_heads)
    out = query.new_empty(query.shape[1], query_heads, value.shape[2])
    for row, (low, high) in enumerate(tile_spans(segments, tile)):
        start = segments.start[row]
        q0, q1 = segments.cu_q[row : row + 2]
        k0, k1 = segments.cu_k[row : row + 2]
        end = start + q1 - q0
        first = end - (k1 - k0)  # position of the row's first recent key
        counts = heads.counts[row].tolist() if bounds is None else bounds.most[row]
        used = -(-max(counts, default=0) // pages.k.shape[1])
        far_k, far_v, far_at = (
            x.repeat_interleave(each, 0)
            for x in global_tokens(pages, heads.table[row, :, :used], heads.counts[row])
        )
        for at in range(low, high):
            begin, stop = max(at * tile, start), min((at + 1) * tile, end)
            here = torch.arange(begin, stop, device=key.device)[:, None]
            band = max(begin - window + 1, first)
            near = torch.arange(band, stop, device=key.device)
            close = (near <= here) & (here - near < window)
            inside = (far_at // tile).clamp(max=blocks.shape[2] - 1)
            chosen = blocks[:, nth].gather(1, inside) if used else far_at < 0
            if columns is not None and reads.sets is not None and used:
                own = columns[:, reads.sets[nth]].to(far_at.dtype).contiguous()
                found = torch.searchsorted(own, far_at).clamp(max=own.shape[1] - 1)
                chosen = chosen | (own.gather(1, found) == far_at)
            # The far position of padding lies after every query.
            seen = chosen[:, None] & (far_at[:, None] <= here - window)
            mask = torch.cat([seen, close.expand(query_heads, -1, -1)], -1)
            recent = slice(k0 + band - first, k0 + stop - first)
            k = torch.cat([far_k, key[:, recent].repeat_interleave(each, 0)], 1)
            v = torch.cat([far_v, value[:, recent].repeat_interleave(each, 0)], 1)
            asked = slice(q0 + begin - start, q0 + stop - start)
            given = query[:, asked], k, v, mask, scale, softcap, sinks
            out[asked] = attend(*given).transpose(0, 1)
            nth += 1
    return out.transpose(0, 1)


def _of_queries(x: Tensor, heads: int) -> Tensor:
    """What KV heads chose, for each of their query heads."""
    return x.repeat_interleave(heads // x.shape[0], 0)
