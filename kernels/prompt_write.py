"""Writing a prompt call's tokens: those admitted that have left the window when it ends.

Admitted tokens are counted tile by tile and the counts summed up along each head; then every tile
knows where its tokens go, and nothing as long as the prompt is kept on the way.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, MARKED, POSITION_BITS, Heads, Pages, Segments
from ._launch import cdiv, check_dense, dense_last, on, padded_units, power_of_two
from ._pages import KEYS, META, VALUES, page_offset, token_rows

_ADMITTED = tl.constexpr(ADMITTED)
_MARKED = tl.constexpr(MARKED)
_POSITION_BITS = tl.constexpr(POSITION_BITS)
_TOKENS = 64  # of a tile, which one program stores
_TILES = 16  # that one program counts
_SCAN = 1024  # tiles that are summed up at once
_FEW = 128  # tiles that are counted by the program that sums them up, some at once
_AT_ONCE = 32


def count_leaving(
    flags: Tensor, before: Tensor, segments: Segments, window: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts after the call, pages to take and each tile's first index; see `Ops.count_leaving`."""
    check_dense("count_leaving", before=before)
    batch, heads = before.shape
    longest = max(b - a for a, b in pairwise(segments.cu_k))
    tiles = max(cdiv(longest - window, _TOKENS), 1)
    flags = dense_last(flags)
    after, fresh = (torch.empty_like(before) for _ in range(2))
    ranks = before.new_empty(batch, heads, tiles)
    few = tiles <= _FEW
    with on(flags):
        if not few:
            _count[cdiv(tiles, _TILES), heads, batch](
                flags, segments.cu_k_dev, ranks, tiles, window, flags.stride(0),
                TOKENS=_TOKENS, TILES=_TILES, num_warps=4,
            )  # fmt: skip
        _scan[heads, batch](
            flags, segments.cu_k_dev, ranks, before, after, fresh, tiles, window, flags.stride(0),
            before.stride(), after.stride(), PAGE=page_size, TOKENS=_TOKENS,
            TILES=_AT_ONCE if few else _SCAN, COUNTS=few, num_warps=4,
        )  # fmt: skip
    return after, fresh, ranks


@triton.jit
def _stored(flags, tile, leaving, TOKENS: tl.constexpr):
    """Admitted tokens of these tiles, among the first `leaving` of a sequence."""
    i = tile[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    bits = tl.load(flags + i, mask=i < leaving, other=0)  # [TILES, T]
    return tl.sum((bits & _ADMITTED).to(tl.int32), 1)


@triton.jit(do_not_specialize=["tiles", "window", "flags_step"])
def _count(
    flags, cu_k, ranks, tiles, window, flags_step, TOKENS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Counts the admitted tokens of some tiles of a head."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(cu_k + b)
    leaving = tl.load(cu_k + b + 1) - first - window
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    ranks += (b * tl.num_programs(1) + h) * tiles
    stored = _stored(flags + h * flags_step + first, tile, leaving, TOKENS)
    tl.store(ranks + tile, stored, mask=tile < tiles)


@triton.jit(
    do_not_specialize=["tiles", "window", "flags_step"],
    do_not_specialize_on_alignment=["before"],
)
def _scan(
    flags, cu_k, ranks, before, after, fresh, tiles, window, flags_step,
    before_strides, after_strides,
    PAGE: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Turns a head's counts by tile, which it may count itself, into each tile's first index."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    ranks += (b * tl.num_programs(0) + h) * tiles
    first = tl.load(cu_k + b)
    leaving = tl.load(cu_k + b + 1) - first - window
    flags += h * flags_step + first
    held = tl.load(before + b * before_strides[0] + h)
    total = held
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        if COUNTS:
            stored = _stored(flags, tile, leaving, TOKENS)
        else:
            stored = tl.load(ranks + tile, mask=tile < tiles, other=0)  # [TILES]
        tl.store(ranks + tile, total + tl.cumsum(stored, 0) - stored, mask=tile < tiles)
        total += tl.sum(stored, 0)
    tl.store(after + b * after_strides[0] + h, total)
    pages = (total + PAGE - 1) // PAGE - (held + PAGE - 1) // PAGE
    tl.store(fresh + b * after_strides[0] + h, pages)


def write_leaving(
    pages: Pages,
    heads: Heads,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    window: int,
    after: Tensor,
    fresh: Tensor,
    ranks: Tensor,
) -> None:
    """Stores what `count_leaving` counted in pages from the free stack; see `Ops.write_leaving`.

    A program stores the tokens of one tile and head. Where the stack is empty they go to the null
    page.
    """
    table, counts = heads
    check_dense("write_leaving", table=table, counts=counts, after=after, fresh=fresh)
    key, value, flags = dense_last(key), dense_last(value), dense_last(flags)
    batch, kv_heads, tiles = ranks.shape
    dim, dim_v = key.shape[2], value.shape[2]
    width, width_v = power_of_two(dim), power_of_two(dim_v)
    units = padded_units(batch, kv_heads)
    with on(pages.k):
        _store[tiles, kv_heads, batch](
            pages.k, pages.v, pages.meta, pages.slabs, pages.free, pages.top, pages.refs,
            table, counts, key, value, flags,
            segments.cu_q_dev, segments.cu_k_dev, segments.start_dev, fresh, ranks, window,
            flags.stride(0), table.stride(), counts.stride(), key.stride(), value.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], DIM=dim, DIM_V=dim_v,
            DIM_PAD=width, DIM_V_PAD=width_v, TOKENS=_TOKENS, ROWS=units,
            num_warps=4 if max(width, width_v) * key.element_size() <= 256 else 8,
        )  # fmt: skip
        _settle[1,](
            counts, after, fresh, pages.top, kv_heads, batch * kv_heads, counts.stride(),
            UNITS_PAD=units, num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "units"])
def _settle(
    counts, after, fresh, top, heads, units, counts_strides, UNITS_PAD: tl.constexpr
):  # fmt: skip
    """Makes the new counts current and the stack shorter, when every tile has read both."""
    unit = tl.arange(0, UNITS_PAD)
    real = unit < units
    held = tl.load(after + unit, mask=real)  # [UNITS]
    b = (unit // heads).to(tl.int64)  # division has 32 bits, which is far cheaper
    tl.store(counts + b * counts_strides[0] + unit % heads, held, mask=real)
    taken = tl.sum(tl.load(fresh + unit, mask=real, other=0), 0)
    tl.store(top, tl.maximum(tl.load(top) - taken, 0))


@triton.jit(do_not_specialize=["window", "flags_step"])
def _store(
    pages_k, pages_v, pages_meta, slabs, free, top, refs, table, counts, key, value, flags,
    cu_q, cu_k, starts, fresh, ranks, window, flags_step,
    table_strides, counts_strides, key_strides, value_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the tokens of one tile and head, in pages of the free stack where new ones begin."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    h, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_k + b)
    span = tl.load(cu_k + b + 1) - first
    if tile * TOKENS >= span - window:
        return
    i = tile * TOKENS + tl.arange(0, TOKENS)
    t = (first + i).to(tl.int64)
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    flags += h * flags_step
    bits = tl.load(flags + t, mask=i < span - window, other=0).to(tl.int32)  # [T]
    stored = (bits & _ADMITTED) != 0
    mask = stored[:, None] & (d < DIM)[None, :]
    mask_v = stored[:, None] & (e < DIM_V)[None, :]
    # Before the search for pages, so that both are in flight together.
    from_k = key + h * key_strides[0] + t[:, None] * key_strides[1] + d[None, :]
    from_v = value + h * value_strides[0] + t[:, None] * value_strides[1] + e[None, :]
    k = tl.load(from_k, mask=mask, other=0.0)  # [T, D]
    v = tl.load(from_v, mask=mask_v, other=0.0)  # [T, Dv]
    row = (b * heads + h).to(tl.int32)
    index = tl.load(ranks + row.to(tl.int64) * tiles + tile) + tl.cumsum(stored.to(tl.int32), 0) - 1
    column, slot = index // PAGE, index % PAGE
    # New pages go to heads in order, to each those that it takes.
    r = tl.arange(0, ROWS)
    given = tl.sum(tl.load(fresh + r, mask=r < row, other=0), 0)
    have = (tl.load(counts + b * counts_strides[0] + h) + PAGE - 1) // PAGE
    new = stored & (column >= have)
    entry = table + b * table_strides[0] + h * table_strides[1] + column
    page = tl.load(entry, mask=stored & (column < have), other=0)  # [T]
    place = tl.load(top) - 1 - (given + column - have)
    page += tl.load(free + place, mask=new & (place >= 0), other=0)
    tl.store(entry, page, mask=new & (slot == 0))
    tl.store(refs + page, tl.full([TOKENS], 1, tl.int32), mask=new & (slot == 0) & (page > 0))
    to_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    tl.store(to_k, k, mask=mask)
    to_v = token_rows(pages_v, slabs, page, slot, e, VALUES, SLAB_PAGES, PAGE, DIM_V)
    tl.store(to_v, v, mask=mask_v)
    position = tl.load(starts + b) + tl.load(cu_q + b + 1) - tl.load(cu_q + b) - span + i
    meta = position | ((bits & _MARKED) != 0).to(tl.int32) << _POSITION_BITS
    to_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
    tl.store(pages_meta + to_meta, meta, mask=stored)
