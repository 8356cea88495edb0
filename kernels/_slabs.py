"""From page ids to addresses."""

from __future__ import annotations

import triton
import triton.language as tl

KEYS = tl.constexpr(0)
VALUES = tl.constexpr(1)
META = tl.constexpr(2)
SUMMARY = tl.constexpr(3)


@triton.jit
def slab_start(slabs, page, column: tl.constexpr, SLAB_PAGES: tl.constexpr):
    """Where the slab of `page` starts, from the first extent and in units of 16 elements."""
    return tl.load(slabs + (page // SLAB_PAGES) * 4 + column)


@triton.jit
def page_offset(slabs, page, column: tl.constexpr, SLAB_PAGES: tl.constexpr, SIZE: tl.constexpr):
    """Offset in elements, from the first extent, of `page`, whose pages hold SIZE elements.

    The table counts in units of 16 elements: the multiplication here tells the compiler that slabs
    are aligned, without which loads shrink to single elements.
    """
    slab = slab_start(slabs, page, column, SLAB_PAGES)
    return slab * 16 + (page % SLAB_PAGES).to(tl.int64) * SIZE
