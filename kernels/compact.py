"""Reading tokens of heads from wherever they lie in pages: what compaction and summaries need."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Pages
from ._launch import cdiv, dense_last, on, power_of_two
from ._slabs import KEYS, META, VALUES, page_offset

_TOKENS = 32  # that one program reads


def read_tokens(pages: Pages, table: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Global tokens `source` `[B, Hkv, n]` of each head; see the reference."""
    batch, heads, tokens = source.shape
    size, dim = pages.k.shape[1:]
    table, source = dense_last(table), dense_last(source)
    k, v = (torch.empty(*source.shape, dim, dtype=x.dtype, device=x.device) for x in pages[:2])
    meta = torch.empty(source.shape, dtype=pages.meta.dtype, device=pages.meta.device)
    if source.numel():
        with on(pages.k):
            _read_tokens[cdiv(tokens, _TOKENS), batch * heads](
                pages.k, pages.v, pages.meta, pages.slabs, table, source, k, v, meta, tokens,
                table.stride(0), table.stride(1), source.stride(0), source.stride(1),
                HEADS=heads, SLAB_PAGES=pages.slab_pages, PAGE=size, DIM=dim,
                DIM_PAD=power_of_two(dim), TOKENS=_TOKENS, num_warps=4,
            )  # fmt: skip
    return k, v, meta


@triton.jit
def _read_tokens(
    pages_k, pages_v, pages_meta, slabs, table, source, k, v, meta, tokens,
    table_b, table_h, source_b, source_h,
    HEADS: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1).to(tl.int64)
    b, h = unit // HEADS, unit % HEADS
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM_PAD)
    token = tl.load(source + b * source_b + h * source_h + i, mask=i < tokens, other=-1)
    there = token >= 0
    token = tl.where(there, token, 0)
    page = tl.load(table + b * table_b + h * table_h + token // PAGE, mask=there, other=0)
    slot = token % PAGE
    inside = slot[:, None] * DIM + d[None, :]
    mask = there[:, None] & (d < DIM)[None, :]
    from_k = page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM)
    from_v = page_offset(slabs, page, VALUES, SLAB_PAGES, PAGE * DIM)
    from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE)
    to = (unit * tokens + i)[:, None] * DIM + d[None, :]
    real = (i < tokens)[:, None] & (d < DIM)[None, :]
    tl.store(k + to, tl.load(pages_k + from_k[:, None] + inside, mask=mask, other=0.0), mask=real)
    tl.store(v + to, tl.load(pages_v + from_v[:, None] + inside, mask=mask, other=0.0), mask=real)
    about = tl.load(pages_meta + from_meta + slot, mask=there, other=0)
    tl.store(meta + unit * tokens + i, about, mask=i < tokens)
