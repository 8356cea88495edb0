"""Expected logits of keys, straight from pages.

A program holds a tile of a head's keys and takes one query head of the group after the other. The
square, k'Ck, is a product of the tile with a part of C's columns, multiplied by the same channels
of the keys and summed. C is split in two parts of the keys' dtype, so that the tensor cores keep
16 bits of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages
from ._launch import cdiv, check_dims, check_dtype, dense_last, dot_size, on, shared_memory
from ._math import dot
from ._pages import KEYS, find, token_rows


class Tile(NamedTuple):
    """Keys of a program, columns of C at a time, warps, stages."""

    keys: int
    columns: int
    warps: int
    stages: int = 2


def choose_tile(dim: int, itemsize: int, shared: int) -> Tile:
    """For a padded head_dim, an element size and the shared memory of a program."""
    if itemsize == 4:
        return Tile(32, 16 if dim > 256 else 64 if dim <= 128 else 32, 4)
    if dim > 128:
        return Tile(32, 32, 4)
    return Tile(128, 128, 8) if shared >= 200 << 10 else Tile(64, 64, 4)


def expected_logits(pages: Pages, heads: Heads, linear: Tensor, square: Tensor | None) -> Tensor:
    """Logits `[B, Hq, M * P]`; see `Ops.expected_logits`."""
    check_dtype("expected_logits", "keys", pages.k)
    size, dim = pages.k.shape[1:]
    check_dims("expected_logits", dim)
    batch, kv_heads, columns = heads.table.shape
    query_heads, width = linear.shape[1], columns * size
    out = torch.empty(batch, query_heads, width, dtype=torch.float32, device=pages.k.device)
    if not out.numel():
        return out
    table, counts, linear = dense_last(heads.table), dense_last(heads.counts), linear.contiguous()
    exact = pages.k.dtype == torch.float32
    high = low = linear  # not read
    factor = None
    if square is not None:
        if pages.k.dtype == torch.float16:  # the parts stay in its range whatever the queries are
            factor = torch.linalg.vector_norm(square, float("inf"), (2, 3)).clamp_(min=1e-30)
            square = square / factor[..., None, None]
        square = square.contiguous()
        high = square.to(pages.k.dtype)
        low = high if exact else (square - high).to(pages.k.dtype)
    pad = dot_size(dim)
    tile = choose_tile(pad, pages.k.element_size(), shared_memory(pages.k.device))
    with on(pages.k):
        _expected_logits[cdiv(width, tile.keys), batch * kv_heads](
            pages.k, pages.slabs, table, counts, linear, high, low, factor, out, width,
            table.stride(), counts.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads,
            GROUP=query_heads // kv_heads, DIM=dim, DIM_PAD=pad, SQUARE=square is not None,
            SPLIT=not exact, KEYS_=tile.keys, COLUMNS=min(pad, tile.columns),
            STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out


@triton.jit
def _times(k, high, low, row, d, at, DIM: tl.constexpr, SPLIT: tl.constexpr):
    """Keys `[N, D]` times the columns `at` of a query head's C, whose parts are added."""
    place = row * (DIM * DIM) + d[:, None] * DIM + at[None, :]
    mask = (d < DIM)[:, None] & (at < DIM)[None, :]
    part = tl.load(high + place, mask=mask, other=0.0)  # [D, C]
    product = dot(k, part, tl.zeros([k.shape[0], at.shape[0]], tl.float32))
    if SPLIT:
        product = dot(k, tl.load(low + place, mask=mask, other=0.0), product)
    return product


@triton.jit
def _expected_logits(
    pages_k, slabs, table, counts, linear, high, low, factor, out, width, table_strides,
    counts_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SQUARE: tl.constexpr, SPLIT: tl.constexpr,
    KEYS_: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of a head's keys, for each query head of its group."""
    WHOLE: tl.constexpr = COLUMNS == DIM_PAD
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n = tl.program_id(0) * KEYS_ + tl.arange(0, KEYS_)
    d, c = tl.arange(0, DIM_PAD), tl.arange(0, COLUMNS)
    count = tl.load(counts + b * counts_strides[0] + head)
    out += unit * GROUP * width + n
    if tl.program_id(0) * KEYS_ >= count:
        for g in range(GROUP):
            tl.store(out + g * width, tl.zeros([KEYS_], tl.float32), mask=n < width)
        return
    there = n < count
    page, slot = find(table + b * table_strides[0] + head * table_strides[1], n, there, PAGE)
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    k = tl.load(from_k, mask=there[:, None] & (d < DIM)[None, :], other=0.0)  # [N, D]
    for g in tl.range(0, GROUP, num_stages=STAGES if WHOLE else 1):
        row = unit * GROUP + g
        m = tl.load(linear + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
        logits = tl.sum(k.to(tl.float32) * m[None, :], 1)
        if SQUARE:
            total = tl.zeros([KEYS_], tl.float32)
            if WHOLE:
                product = _times(k, high, low, row, d, d, DIM, SPLIT)
                total += tl.sum(product * k.to(tl.float32), 1)
            else:
                for start in tl.range(0, DIM_PAD, COLUMNS, num_stages=STAGES):
                    at = start + c
                    product = _times(k, high, low, row, d, at, DIM, SPLIT)
                    from_c = token_rows(pages_k, slabs, page, slot, at, KEYS, SLAB_PAGES, PAGE, DIM)
                    same = tl.load(from_c, mask=there[:, None] & (at < DIM)[None, :], other=0.0)
                    total += tl.sum(product * same.to(tl.float32), 1)
            if factor is not None:
                total *= tl.load(factor + row)
            logits += total
        tl.store(out + g * width, tl.where(there, logits, 0.0), mask=n < width)
