"""Norms of stored keys or values, straight from pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages
from ._launch import cdiv, check_dtype, dense_last, on, power_of_two
from ._pages import KEYS, VALUES, find, token_rows

_ROWS = 64  # tokens that one program looks at


def key_norms(pages: Pages, heads: Heads) -> Tensor:
    """Norms `[B, Hkv, M * P]` of keys; see `Ops.key_norms`."""
    check_dtype("key_norms", "keys", pages.k)
    return _of(pages, pages.k, KEYS.value, heads)


def value_norms(pages: Pages, heads: Heads) -> Tensor:
    """Norms `[B, Hkv, M * P]` of values; see `Ops.value_norms`."""
    check_dtype("value_norms", "values", pages.v)
    return _of(pages, pages.v, VALUES.value, heads)


def _of(pages: Pages, store: Tensor, column: int, heads: Heads) -> Tensor:
    size, dim = store.shape[1:]
    batch, kv_heads, columns = heads.table.shape
    width = columns * size
    out = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=store.device)
    if out.numel():
        table, counts = dense_last(heads.table), dense_last(heads.counts)
        with on(store):
            _norms[cdiv(width, _ROWS), batch * kv_heads](
                store, pages.slabs, table, counts, out, width, table.stride(), counts.stride(),
                COLUMN=column, SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, DIM=dim,
                DIM_PAD=power_of_two(dim), ROWS=_ROWS, num_warps=4,
            )  # fmt: skip
    return out


@triton.jit
def _norms(
    store, slabs, table, counts, out, width, table_strides, counts_strides,
    COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norms of a tile of a head's keys or values."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    there = n < tl.load(counts + b * counts_strides[0] + head)
    page, slot = find(table + b * table_strides[0] + head * table_strides[1], n, there, PAGE)
    source = token_rows(store, slabs, page, slot, d, COLUMN, SLAB_PAGES, PAGE, DIM)
    x = tl.load(source, mask=there[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    tl.store(out + unit * width + n, tl.sqrt(tl.sum(x * x, 1)), mask=n < width)
