"""Tokens of heads by number: reading them from wherever they lie, moving kept ones together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Pages
from ._launch import cdiv, dense_last, on, power_of_two
from ._pages import KEYS, META, VALUES, find, page_offset, token_rows

_TOKENS = 32  # that one program of `read_tokens` reads
_MOVED = 16 << 10  # bytes of keys or of values that one program holds


def read_tokens(pages: Pages, table: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Global tokens `source` `[B, Hkv, n]` of each head; see `Ops.read_tokens`."""
    batch, heads, tokens = source.shape
    size, dim, dim_v = *pages.k.shape[1:], pages.v.shape[2]
    table, source = dense_last(table), source.contiguous()
    k, v = (
        torch.empty(*source.shape, d, dtype=x.dtype, device=x.device)
        for x, d in ((pages.k, dim), (pages.v, dim_v))
    )
    meta = torch.empty(source.shape, dtype=pages.meta.dtype, device=pages.meta.device)
    if source.numel():
        with on(pages.k):
            _read_tokens[cdiv(tokens, _TOKENS), batch * heads](
                pages.k, pages.v, pages.meta, pages.slabs, table, source, k, v, meta, tokens,
                table.stride(),
                HEADS=heads, SLAB_PAGES=pages.slab_pages, PAGE=size, DIM=dim, DIM_V=dim_v,
                DIM_PAD=power_of_two(dim), DIM_V_PAD=power_of_two(dim_v), TOKENS=_TOKENS,
                num_warps=4,
            )  # fmt: skip
    return k, v, meta


@triton.jit(do_not_specialize=["tokens"])  # as many as happen to stay
def _read_tokens(
    pages_k, pages_v, pages_meta, slabs, table, source, k, v, meta, tokens,
    table_strides,
    HEADS: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Copies a block of the tokens asked for of one head; zeros for those of number -1."""
    unit = tl.program_id(1).to(tl.int64)
    b, h = unit // HEADS, unit % HEADS
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    source += unit * tokens
    token = tl.load(source + i, mask=i < tokens, other=-1)  # [T]
    there = token >= 0
    token = tl.where(there, token, 0)
    own = table + b * table_strides[0] + h * table_strides[1]
    page, slot = find(own, token, there, PAGE)
    mask = there[:, None] & (d < DIM)[None, :]
    mask_v = there[:, None] & (e < DIM_V)[None, :]
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    from_v = token_rows(pages_v, slabs, page, slot, e, VALUES, SLAB_PAGES, PAGE, DIM_V)
    from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
    row = (unit * tokens + i)[:, None]
    real = (i < tokens)[:, None] & (d < DIM)[None, :]
    tl.store(k + (row * DIM + d[None, :]), tl.load(from_k, mask=mask, other=0.0), mask=real)
    real_v = (i < tokens)[:, None] & (e < DIM_V)[None, :]
    tl.store(v + (row * DIM_V + e[None, :]), tl.load(from_v, mask=mask_v, other=0.0), mask=real_v)
    about = tl.load(pages_meta + from_meta, mask=there, other=0)  # [T]
    tl.store(meta + unit * tokens + i, about, mask=i < tokens)


def move_kept(
    pages: Pages, old: Tensor, new: Tensor, keep: Tensor, starts: Tensor, lengths: Tensor
) -> None:
    """Moves the kept tokens of each head `[U]` to its front, in order; see `Ops.move_kept`.

    One program for the keys of a head and one for its values walk the tokens in rising order.
    """
    dim, dim_v = pages.k.shape[2], pages.v.shape[2]
    old, new = dense_last(old), dense_last(new)
    widest = power_of_two(max(dim, dim_v)) * pages.k.element_size()
    tokens = max(min(_MOVED // widest, 128), 16)
    if lengths.numel():
        with on(pages.k):
            _move_kept[lengths.numel(), 2](
                pages.k, pages.v, pages.meta, pages.slabs, old, new, keep.view(torch.uint8),
                starts.contiguous(), lengths.contiguous(), old.stride(0), new.stride(0),
                SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], DIM=dim, DIM_V=dim_v,
                DIM_PAD=power_of_two(dim), DIM_V_PAD=power_of_two(dim_v), TOKENS=tokens,
                num_warps=4,
            )  # fmt: skip


@triton.jit
def _move_kept(
    pages_k, pages_v, pages_meta, slabs, old, new, keep, starts, lengths, old_u, new_u,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Moves the keys and meta of a head, or its values."""
    unit = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + unit)
    if length > 0:
        keep += tl.load(starts + unit)
        old += unit * old_u
        new += unit * new_u
        if tl.program_id(1) == 0:
            _move(
                pages_k, pages_meta, slabs, old, new, keep, length,
                KEYS, SLAB_PAGES, PAGE, DIM, DIM_PAD, TOKENS, True,
            )  # fmt: skip
        else:
            _move(
                pages_v, pages_meta, slabs, old, new, keep, length,
                VALUES, SLAB_PAGES, PAGE, DIM_V, DIM_V_PAD, TOKENS, False,
            )  # fmt: skip


@triton.jit
def _move(
    store, pages_meta, slabs, old, new, keep, length,
    COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, TOKENS: tl.constexpr, WITH_META: tl.constexpr,
):  # fmt: skip
    """Moves what a head has in one store, in place, a block of TOKENS after the other.

    Token n goes to a place that is at most n, and places rise with tokens. So a block overwrites
    tokens of its own, which the barrier says have been read, or of earlier blocks; what later
    blocks read lies above all that it writes and may be loaded at any time. No other program
    touches these pages: those of other heads are others, and pages held twice are only read.
    """
    i = tl.arange(0, TOKENS)
    d = tl.arange(0, DIM_PAD)
    start = length * 0
    placed = length * 0
    kept = tl.load(keep + i, mask=i < length, other=0)
    while start < length:
        n = start + i
        stays = kept != 0
        start += TOKENS
        kept = tl.load(keep + start + i, mask=start + i < length, other=0)  # the next block's
        mask = stays[:, None] & (d < DIM)[None, :]
        page, slot = find(old, n, stays, PAGE)
        source = token_rows(store, slabs, page, slot, d, COLUMN, SLAB_PAGES, PAGE, DIM)
        row = tl.load(source, mask=mask, other=0.0)  # [T, D]
        about = n * 0
        if WITH_META:
            from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
            about = tl.load(pages_meta + from_meta, mask=stays, other=0)  # [T]
        place = placed + tl.cumsum(stays.to(tl.int32), 0) - 1
        placed += tl.sum(stays.to(tl.int32), 0)
        page, slot = find(new, place, stays, PAGE)
        target = token_rows(store, slabs, page, slot, d, COLUMN, SLAB_PAGES, PAGE, DIM)
        tl.debug_barrier()
        tl.store(target, row, mask=mask)
        if WITH_META:
            to_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
            tl.store(pages_meta + to_meta, about, mask=stays)
