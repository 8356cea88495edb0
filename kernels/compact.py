"""Compaction: kept tokens move to new pages without gaps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import Pages
from ._launch import cdiv, dense_last, on, power_of_two
from ._slabs import KEYS, META, VALUES, page_offset

_TOKENS = 32


def move(pages: Pages, source: Tensor, target: Tensor, dest: Tensor) -> None:
    """Copies tokens between pages; see the reference."""
    batch, heads, tokens = dest.shape
    if dest.numel() == 0:
        return
    source, target, dest = dense_last(source), dense_last(target), dense_last(dest)
    with on(pages.k):
        _move[cdiv(tokens, _TOKENS), heads, batch](
            pages.k, pages.v, pages.meta, pages.slabs, source, target, dest, tokens,
            source.stride(0), source.stride(1), target.stride(0), target.stride(1),
            dest.stride(0), dest.stride(1),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], DIM=pages.k.shape[2],
            DIM_PAD=power_of_two(pages.k.shape[2]), TOKENS=_TOKENS, num_warps=4,
        )  # fmt: skip


@triton.jit
def _move(
    pages_k, pages_v, pages_meta, slabs, source, target, dest, tokens,
    source_b, source_h, target_b, target_h, dest_b, dest_h,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM_PAD)
    index = tl.load(dest + b * dest_b + h * dest_h + n, mask=n < tokens, other=-1)
    kept = index >= 0
    old = tl.load(source + b * source_b + h * source_h + n // PAGE, mask=kept, other=0)
    new = tl.load(target + b * target_b + h * target_h + index // PAGE, mask=kept, other=0)
    old_slot = n % PAGE
    new_slot = index % PAGE
    mask = kept[:, None] & (d < DIM)[None, :]
    old_at = old_slot[:, None] * DIM + d[None, :]
    new_at = new_slot[:, None] * DIM + d[None, :]
    from_k = page_offset(slabs, old, KEYS, SLAB_PAGES, PAGE * DIM)
    from_v = page_offset(slabs, old, VALUES, SLAB_PAGES, PAGE * DIM)
    k = tl.load(pages_k + from_k[:, None] + old_at, mask=mask, other=0.0)
    v = tl.load(pages_v + from_v[:, None] + old_at, mask=mask, other=0.0)
    to_k = page_offset(slabs, new, KEYS, SLAB_PAGES, PAGE * DIM)
    to_v = page_offset(slabs, new, VALUES, SLAB_PAGES, PAGE * DIM)
    tl.store(pages_k + to_k[:, None] + new_at, k, mask=mask)
    tl.store(pages_v + to_v[:, None] + new_at, v, mask=mask)
    from_meta = page_offset(slabs, old, META, SLAB_PAGES, PAGE)
    meta = tl.load(pages_meta + from_meta + old_slot, mask=kept, other=0)
    tl.store(
        pages_meta + page_offset(slabs, new, META, SLAB_PAGES, PAGE) + new_slot, meta, mask=kept
    )
