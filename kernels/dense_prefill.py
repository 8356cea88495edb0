"""Plain causal attention of a prompt call through the best dense kernel present."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops import Pages, Segments, check_asked
from ._flash import find_flash
from ._launch import cdiv, check_dims, check_dtype, numbers_on
from .page_io import read_pages
from .sparse_prefill import attend, tile_of

_FUSED = 256  # head_dim of the fused kernels that torch has for fewer KV heads
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
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention where every token is stored `[Hq, Tq, Dv]`; see `Ops.dense_prefill`.

    FlashAttention-3 runs where it is installed and takes these queries (Hopper devices only);
    else torch's fused attention for whole prompts and the tile kernel for later chunks, and for
    what these do not compute: softcaps, sinks, values of another head_dim, a head_dim above 256.
    """
    check_dtype("dense_prefill", "query", query)
    check_asked("dense_prefill", query.shape[0], softcap, sinks)
    dim_v, size = value.shape[2], pages.k.shape[1]
    check_dims("dense_prefill", key.shape[2], dim_v)
    alone = len(segments.start) == 1 and query.shape[1] > 0
    out = torch.empty(
        0 if alone else query.shape[1], query.shape[0], dim_v, dtype=query.dtype,
        device=query.device,
    )  # fmt: skip
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
        attended = _causal(query[:, q0:q1], k, v, start, scale, softcap, sinks)
        if alone:
            return attended
        out[q0:q1] = attended.transpose(0, 1)
    return out.transpose(0, 1)


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries at positions start, start + 1, ... over keys from position 0 on. `[Hq, T, Dv]`."""
    alike = sinks is None and key.shape[2] == value.shape[2]
    flash = find_flash(query, softcap) if alike else None
    if flash is not None:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        more = {} if softcap is None else {"softcap": softcap}
        out = flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, **more)
        out = out[0] if isinstance(out, tuple) else out
        return out[0].transpose(0, 1)
    fused = alike and softcap is None and key.shape[2] <= _FUSED
    if not fused or (start and query.is_cuda):
        return _tiles(query, key, value, start, scale, softcap, sinks)
    mask = None
    if start:  # as logits, since torch makes them of a mask of bools
        mask = query.new_full((query.shape[1], key.shape[1]), float("-inf")).triu_(start + 1)
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


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The tile kernel with a window that covers everything: fused, for a rectangle's end."""
    bounds = (0, query.shape[1]), (0, key.shape[1]), (start,)
    numbers = numbers_on(query.device, *bounds)
    segments = Segments(*bounds, numbers[0, :2], numbers[1, :2], numbers[2, :1])
    flags = torch.zeros(1, key.shape[1], dtype=torch.uint8, device=key.device)
    counts = numbers[0, :1].expand(1, key.shape[0])
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
        tile_of(query, value),
        softcap=softcap,
        sinks=sinks,
    )
