"""Plain causal attention of a prompt call through the best dense kernel present."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops import Pages, Segments
from ._flash import find_flash
from ._launch import cdiv, check_dtype
from .page_io import read_pages
from .sparse_prefill import attend, tile_of

_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    pages: Pages,
    table: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention where every token is stored `[Hq, Tq, D]`; see `Ops.dense_prefill`.

    FlashAttention-3 runs where it is installed and takes these queries (Hopper devices only);
    else torch's fused attention for whole prompts and the tile kernel for later chunks.
    """
    check_dtype("dense_prefill", "query", query)
    dim, size = key.shape[2], pages.k.shape[1]
    out = torch.empty(query.shape[1], query.shape[0], dim, dtype=query.dtype, device=query.device)
    for row, start in enumerate(segments.start):
        q0, q1 = segments.cu_q[row : row + 2]
        k0, k1 = segments.cu_k[row : row + 2]
        if q0 == q1:
            continue
        first = start + (q1 - q0) - (k1 - k0)
        k, v = key[:, k0:k1], value[:, k0:k1]
        if first:
            far_k, far_v, _ = read_pages(pages, table[row, :, : cdiv(first, size)])
            k = torch.cat([far_k.flatten(1, 2)[:, :first], k], 1)
            v = torch.cat([far_v.flatten(1, 2)[:, :first], v], 1)
        out[q0:q1] = _causal(query[:, q0:q1], k, v, start, scale).transpose(0, 1)
    return out.transpose(0, 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, start: int, scale: float) -> Tensor:
    """Queries at positions start, start + 1, ... over keys from position 0 on. `[Hq, T, D]`."""
    flash = find_flash(query)
    if flash is not None:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out[0].transpose(0, 1)
    if start and query.is_cuda:
        return _tiles(query, key, value, start, scale)
    mask = None
    if start:
        at = torch.arange(key.shape[1], device=key.device)
        mask = at <= at[start:, None]
    with sdpa_kernel(_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None and query.shape[1] > 1,
            scale=scale,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]


def _tiles(query: Tensor, key: Tensor, value: Tensor, start: int, scale: float) -> Tensor:
    """The tile kernel with a window that covers everything: fused, for a rectangle's end."""
    bounds = (0, query.shape[1]), (0, key.shape[1]), (start,)
    numbers = torch.tensor([*bounds[0], *bounds[1], start], dtype=torch.int32, device=query.device)
    segments = Segments(*bounds, numbers[:2], numbers[2:4], numbers[4:])
    flags = torch.zeros(1, key.shape[1], dtype=torch.uint8, device=key.device)
    counts = numbers[:1].expand(1, key.shape[0])
    return attend(
        query,
        key,
        value,
        flags.expand(key.shape[0], -1),
        segments,
        counts,
        None,
        1 << 30,
        scale,
        tile_of(query),
    )
