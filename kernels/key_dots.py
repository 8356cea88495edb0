"""Dots of stored keys with a few vectors, and the sum of keys' directions, straight from pages.

A program holds a tile of a head's keys. Directions are added tile after tile in a fixed split of
the head, and splits as integers, which add in any order: how wide the table is changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages, Pairs
from ._launch import cdiv, check_dims, check_dtype, dense_last, on, power_of_two
from ._pages import KEYS, find, page_offset, token_rows

_SPLIT = 1024  # keys whose directions one program adds
_UNIT = 1 << 32  # sums are added in units of this part
_LEAST = tl.constexpr(1e-8)


def key_dots(
    pages: Pages, heads: Heads, vectors: Tensor, sizes: Tensor | None = None,
    pairs: Pairs | None = None, *, unit: bool = False,
) -> Tensor:  # fmt: skip
    """Dots `[B, Hq, M * P]`; see `Ops.key_dots`."""
    check_dtype("key_dots", "keys", pages.k)
    size, dim = pages.k.shape[1:]
    check_dims("key_dots", dim)
    batch, kv_heads, columns = heads.table.shape
    query_heads, width = vectors.shape[1], columns * size
    out = torch.empty(batch, query_heads, width, dtype=torch.float32, device=pages.k.device)
    if not out.numel():
        return out
    table, counts = dense_last(heads.table), dense_last(heads.counts)
    vectors = vectors.float().contiguous()
    own = vectors if sizes is None else sizes.float().contiguous()
    half = 1 if sizes is None else sizes.shape[2]
    pad = power_of_two(dim)
    keys = 64 if pad <= 128 else 32 if pad <= 256 else 16
    with on(pages.k):
        _key_dots[cdiv(width, keys), batch * kv_heads](
            pages.k, pages.slabs, table, counts, vectors, own, out, width, table.stride(),
            counts.stride(), *(pairs or Pairs(0, 0, 0)),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads,
            GROUP=query_heads // kv_heads, DIM=dim, DIM_PAD=pad, HALF=half,
            HALF_PAD=power_of_two(half), PAIRED=sizes is not None, UNIT=unit, KEYS_=keys,
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _key_dots(
    pages_k, slabs, table, counts, vectors, sizes, out, width, table_strides, counts_strides,
    first, step, gap,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    PAIRED: tl.constexpr, UNIT: tl.constexpr, KEYS_: tl.constexpr,
):  # fmt: skip
    """Dots of a tile of a head's keys, with each vector of its group."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n, d = tl.program_id(0) * KEYS_ + tl.arange(0, KEYS_), tl.arange(0, DIM_PAD)
    count = tl.load(counts + b * counts_strides[0] + head)
    out += unit * GROUP * width + n
    if tl.program_id(0) * KEYS_ >= count:
        for g in range(GROUP):
            tl.store(out + g * width, tl.zeros([KEYS_], tl.float32), mask=n < width)
        return
    there = n < count
    page, slot = find(table + b * table_strides[0] + head * table_strides[1], n, there, PAGE)
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    k = tl.load(from_k, mask=there[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    over = tl.full([KEYS_], 1.0, tl.float32)
    if UNIT:
        over = tl.maximum(tl.sqrt(tl.sum(k * k, 1)), _LEAST)
    if PAIRED:
        f = tl.arange(0, HALF_PAD)
        at = first + f * step
        base = page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM) + slot * DIM  # [N]
        mask = there[:, None] & (f < HALF)[None, :]
        from_pair = pages_k + base[:, None] + at[None, :]
        one = tl.load(from_pair, mask=mask, other=0.0).to(tl.float32)  # [N, F]
        other = tl.load(from_pair + gap, mask=mask, other=0.0).to(tl.float32)
        length = tl.sqrt(one * one + other * other)
    for g in range(GROUP):
        row = unit * GROUP + g
        m = tl.load(vectors + row * DIM + d, mask=d < DIM, other=0.0)
        found = tl.sum(k * m[None, :], 1)
        if PAIRED:
            s = tl.load(sizes + row * HALF + f, mask=f < HALF, other=0.0)
            found += tl.sum(length * s[None, :], 1)
        tl.store(out + g * width, tl.where(there, found / over, 0.0), mask=n < width)


def key_directions(pages: Pages, heads: Heads) -> Tensor:
    """Sums `[B, Hkv, D]`; see `Ops.key_directions`."""
    check_dtype("key_directions", "keys", pages.k)
    size, dim = pages.k.shape[1:]
    check_dims("key_directions", dim)
    batch, kv_heads, columns = heads.table.shape
    parts, pad = cdiv(columns * size, _SPLIT), power_of_two(dim)
    part = torch.empty(batch, kv_heads, parts, dim, dtype=torch.float32, device=pages.k.device)
    if part.numel():
        table, counts = dense_last(heads.table), dense_last(heads.counts)
        with on(pages.k):
            _key_directions[parts, batch * kv_heads](
                pages.k, pages.slabs, table, counts, part, parts, table.stride(),
                counts.stride(), SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads,
                DIM=dim, DIM_PAD=pad, SPLIT=_SPLIT, KEYS_=32 if pad <= 256 else 16, num_warps=4,
            )  # fmt: skip
    return (part.double() * _UNIT).round().long().sum(2).double() / _UNIT


@triton.jit
def _key_directions(
    pages_k, slabs, table, counts, part, parts, table_strides, counts_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, SPLIT: tl.constexpr, KEYS_: tl.constexpr,
):  # fmt: skip
    """The sum of k / |k| over one split of a head's keys."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n, d = tl.arange(0, KEYS_), tl.arange(0, DIM_PAD)
    count = tl.load(counts + b * counts_strides[0] + head)
    table += b * table_strides[0] + head * table_strides[1]
    low = tl.program_id(0) * SPLIT
    total = tl.zeros([DIM_PAD], tl.float32)
    for start in tl.range(low, tl.minimum(low + SPLIT, count), KEYS_, num_stages=3):
        there = start + n < count
        page, slot = find(table, start + n, there, PAGE)
        from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
        k = tl.load(from_k, mask=there[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
        over = tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)
        total += tl.sum(k / over[:, None], 0)
    to = part + (unit * parts + tl.program_id(0)) * DIM + d
    tl.store(to, total, mask=d < DIM)
