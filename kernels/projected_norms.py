"""Norms of what stored values add to the residual stream, straight from pages.

A program holds a tile of a head's values and streams the output projection of the group's query
heads past it. Sizes of products are added as they come, so that none of them is ever held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages
from ._launch import cdiv, check_dims, check_dtype, dense_last, dot_size, on, shared_memory
from ._math import dot
from ._pages import VALUES, find, token_rows
from .expected_attention import Tile, choose_tile


def tile_of(dim: int, itemsize: int, shared: int) -> Tile:
    """Values and columns of the projection; a column is one load where keys' C is two."""
    tile = choose_tile(dim, itemsize, shared)
    return tile._replace(stages=3 if itemsize == 2 and dim <= 256 else 1 if dim > 256 else 2)


def projected_norms(pages: Pages, heads: Heads, weight: Tensor) -> Tensor:
    """Norms `[B, Hkv, M * P]`; see `Ops.projected_norms`."""
    check_dtype("projected_norms", "values", pages.v)
    check_dtype("projected_norms", "weight", weight)
    size, dim = pages.v.shape[1:]
    check_dims("projected_norms", dim, dim)
    batch, kv_heads, columns = heads.table.shape
    width = columns * size
    out = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=pages.v.device)
    if not out.numel():
        return out
    table, counts = dense_last(heads.table), dense_last(heads.counts)
    pad = dot_size(dim)
    tile = tile_of(pad, weight.element_size(), shared_memory(weight.device))
    with on(pages.v):
        _projected_norms[cdiv(width, tile.keys), batch * kv_heads](
            pages.v, pages.slabs, table, counts, weight, out, width, weight.shape[2],
            table.stride(), counts.stride(), weight.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads,
            GROUP=weight.shape[0] // kv_heads, DIM=dim, DIM_PAD=pad, VALUES_=tile.keys,
            COLUMNS=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out


@triton.jit
def _projected_norms(
    pages_v, slabs, table, counts, weight, out, width, hidden, table_strides, counts_strides,
    weight_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUES_: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Mean over a group's query heads of a tile of values' norms."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n = tl.program_id(0) * VALUES_ + tl.arange(0, VALUES_)
    d, c = tl.arange(0, DIM_PAD), tl.arange(0, COLUMNS)
    count = tl.load(counts + b * counts_strides[0] + head)
    out += unit * width + n
    if tl.program_id(0) * VALUES_ >= count:
        tl.store(out, tl.zeros([VALUES_], tl.float32), mask=n < width)
        return
    there = n < count
    page, slot = find(table + b * table_strides[0] + head * table_strides[1], n, there, PAGE)
    from_v = token_rows(pages_v, slabs, page, slot, d, VALUES, SLAB_PAGES, PAGE, DIM)
    v = tl.load(from_v, mask=there[:, None] & (d < DIM)[None, :], other=0.0)  # [N, D]
    v = v.to(weight.dtype.element_ty)
    total = tl.zeros([VALUES_], tl.float32)
    for g in range(GROUP):
        own = weight + (head * GROUP + g) * weight_strides[0]
        own += d.to(tl.int64)[:, None] * weight_strides[1]
        for start in tl.range(0, hidden, COLUMNS, num_stages=STAGES):
            at = start + c
            mask = (d < DIM)[:, None] & (at < hidden)[None, :]
            from_w = own + at.to(tl.int64)[None, :] * weight_strides[2]
            w = tl.load(from_w, mask=mask, other=0.0)  # [D, C]
            product = dot(v, w, tl.zeros([VALUES_, COLUMNS], tl.float32))
            total += tl.sum(tl.abs(product), 1)
    tl.store(out, tl.where(there, total / GROUP, 0.0), mask=n < width)
