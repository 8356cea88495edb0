"""From tokens of a head to addresses: page, slab, row.

An address takes two loads before it: the page's id from the head's table, and where the page's
slab starts (see `kvpolicy.ops.Pages`).
"""

from __future__ import annotations

import triton
import triton.language as tl

KEYS = tl.constexpr(0)
VALUES = tl.constexpr(1)
META = tl.constexpr(2)
SUMMARY = tl.constexpr(3)


@triton.jit
def find(table, n, seen, PAGE: tl.constexpr, MASKED: tl.constexpr = True):
    """Pages of tokens n of the head whose table this is, and slots in them.

    Where not `seen` the page is 0; all tokens are there if not MASKED.
    """
    at = table + n // PAGE
    page = tl.load(at, mask=seen, other=0) if MASKED else tl.load(at)  # [N]
    return page, n % PAGE


@triton.jit
def slab_start(slabs, page, COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr):
    """Where the slab of `page` starts, from the first extent and in units of 16 elements."""
    return tl.load(slabs + (page // SLAB_PAGES) * 4 + COLUMN)


@triton.jit
def offset_in(slab, nth, SIZE: tl.constexpr):
    """Offset in elements, from the first extent, of page number `nth` of a slab; it holds SIZE.

    The table of slabs counts in units of 16 elements: the multiplication here tells the compiler
    that slabs are aligned, without which loads shrink to single elements.
    """
    return slab * 16 + nth.to(tl.int64) * SIZE


@triton.jit
def page_offset(slabs, page, COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr, SIZE: tl.constexpr):
    """Offset in elements, from the first extent, of `page`, whose pages hold SIZE elements."""
    return offset_in(slab_start(slabs, page, COLUMN, SLAB_PAGES), page % SLAB_PAGES, SIZE)


@triton.jit
def row_pointers(store, offset, slot, d, DIM: tl.constexpr):
    """Channels d of tokens in these slots of one page, or of one page each: `[N, D]`."""
    if len(offset.shape) == 1:
        offset = offset[:, None]
    return store + offset + (slot * DIM)[:, None] + d[None, :]


@triton.jit
def token_rows(
    store, slabs, page, slot, d, COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """`row_pointers` of keys or values in pages that `find` found."""
    return row_pointers(
        store, page_offset(slabs, page, COLUMN, SLAB_PAGES, PAGE * DIM), slot, d, DIM
    )
