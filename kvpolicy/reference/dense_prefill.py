"""Plain causal attention of a prompt call, for layers where nothing was filtered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Pages, Segments, check_asked
from ._logits import attend
from .page_io import read_pages

TILE = 256


def dense_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    pages: Pages,
    table: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention `[Hq, Tq, Dv]` where every token is stored: `Ops.dense_prefill`."""
    check_asked("dense_prefill", query.shape[0], softcap, sinks)
    of_torch, tokens = softcap is None and sinks is None, query.shape[1]
    alone = of_torch and len(segments.start) == 1 and tokens > 0  # what torch returns is the answer
    out = query.new_empty(0 if alone else tokens, query.shape[0], value.shape[2])
    for row, start in enumerate(segments.start):
        q0, q1 = segments.cu_q[row : row + 2]
        k0, k1 = segments.cu_k[row : row + 2]
        if q0 == q1:
            continue
        first = start + (q1 - q0) - (k1 - k0)
        k, v = key[:, k0:k1], value[:, k0:k1]
        if first:
            used = -(-first // pages.k.shape[1])
            far_k, far_v, _ = read_pages(pages, table[row, :, :used])
            k = torch.cat([far_k.flatten(1, 2)[:, :first], k], 1)
            v = torch.cat([far_v.flatten(1, 2)[:, :first], v], 1)
        if not of_torch:
            for tile in range(0, q1 - q0, TILE):
                own = query[:, q0 + tile : min(q0 + tile + TILE, q1)]
                out[q0 + tile : q0 + tile + own.shape[1]] = _tile(
                    own, k, v, start + tile, scale, softcap, sinks
                ).transpose(0, 1)
            continue
        mask = None
        if start:
            at = torch.arange(start + q1 - q0, device=key.device)
            mask = at <= at[start:, None]
        attended = F.scaled_dot_product_attention(
            query[None, :, q0:q1],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=mask is None and q1 - q0 > 1,
            scale=scale,
            enable_gqa=query.shape[0] != key.shape[0],
        )
        if alone:
            return attended[0]
        out[q0:q1] = attended[0].transpose(0, 1)
    return out.transpose(0, 1)


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries `[Hq, T, D]` at positions start, start + 1, ... over keys from position 0 on."""
    heads, tokens, dim = query.shape
    at = torch.arange(start + tokens, device=key.device)
    folded = query.reshape(key.shape[0], -1, dim)
    k, v = key[:, : start + tokens], value[:, : start + tokens]
    out = attend(folded, k, v, (at <= at[start:, None])[None], scale, softcap, sinks)
    return out.view(heads, tokens, -1)
