"""The smallest and largest key of pages, which page selections such as Quest's read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages, check_minmax
from ._launch import dense_last, on, power_of_two
from ._math import narrow
from ._pages import KEYS, SUMMARY, page_offset

_HELD = 4096  # elements of keys that one program holds


def write_minmax(pages: Pages, heads: Heads, before: Tensor, most: int) -> None:
    """Summarizes the pages with tokens from `before` `[B, Hkv]` on; see `Ops.write_minmax`."""
    check_minmax("write_minmax", pages)
    (table, counts), (size, dim) = heads, pages.k.shape[1:]
    batch, kv_heads = counts.shape
    if not most or not counts.numel():
        return
    table, counts, before = dense_last(table), dense_last(counts), dense_last(before)
    channels = min(power_of_two(dim), max(_HELD // power_of_two(size), 16))
    with on(pages.k):
        _write_minmax[most, kv_heads, batch](
            pages.k, pages.summary, pages.slabs, table, counts, before,
            table.stride(), counts.stride(), before.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=size, PAGE_PAD=power_of_two(size), DIM=dim,
            CHANNELS=channels, num_warps=2,
        )  # fmt: skip


@triton.jit
def _write_minmax(
    pages_k, summary, slabs, table, counts, before, table_strides, counts_strides, before_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Summarizes one page of a head, if the head has it."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + b * counts_strides[0] + h)
    first = tl.load(before + b * before_strides[0] + h)
    column = first // PAGE + tl.program_id(0)
    if (first < count) & (column * PAGE < count):
        page = tl.load(table + b * table_strides[0] + h * table_strides[1] + column)
        keys = pages_k + page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM)
        extent = summary + page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM)
        s = tl.arange(0, PAGE_PAD)
        there = (s < tl.minimum(count - column * PAGE, PAGE))[:, None]
        for start in tl.static_range(0, DIM, CHANNELS):
            d = start + tl.arange(0, CHANNELS)
            real = d < DIM
            key = tl.load(
                keys + (s * DIM)[:, None] + d[None, :], mask=there & real[None, :], other=0.0
            ).to(tl.float32)  # [P, D]
            low = tl.min(tl.where(there, key, float("inf")), 0)
            high = tl.max(tl.where(there, key, float("-inf")), 0)
            if page > 0:
                tl.store(extent + d, narrow(low, summary.dtype.element_ty), mask=real)
                tl.store(extent + DIM + d, narrow(high, summary.dtype.element_ty), mask=real)
