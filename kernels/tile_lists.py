"""What tiles of a prompt call read of the gathered rows of a layer, listed before they are read.

A block of keys is a range of a head's rows, since these lie in the order of their positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Segments, TileReads
from ._launch import cdiv, on, padded_units, power_of_two
from .prefill_gather import ROWS, first_row, rows_before


class Lists(NamedTuple):
    """What tiles read without a mask: first rows of whole steps `[Hs, n, F]` int32, others as
    `row << 8 | rows` `[Hs, n, P]` int64, and `[Hs, n, 5]` int32: how many of each, the rows before
    the window of the tile's first query and of its last, and the first of the head's last ROWS."""

    whole: Tensor
    rest: Tensor
    counts: Tensor


def edges_of(at: Tensor, counts: Tensor, width: int, tile: int, steps: int) -> Tensor:
    """The row at which each of `width` blocks of a head begins, and the last one's end.

    `[B * Hkv, width + 1]` int32; `at` are the rows' positions, `counts` `[B, Hkv]` their numbers.
    """
    edges = torch.empty(counts.numel(), width + 1, dtype=torch.int32, device=at.device)
    with on(at):
        _edges[cdiv(width + 1, 128), counts.numel()](
            at, counts, edges, width, tile, steps, UNITS_PAD=padded_units(*counts.shape),
            ROWS=ROWS, BLOCK=128, num_warps=4,
        )  # fmt: skip
    return edges


def columns_of(
    reads: TileReads, of: Tensor, at: Tensor, counts: Tensor, kv_heads: int, steps: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Positions, their rows (-1: not stored), both `[Hs, C, K]` int32, and each tile's set."""
    if reads.columns is None or reads.sets is None:
        return None
    where, sets = reads.columns.contiguous(), reads.sets.contiguous()
    heads, many, each = where.shape
    owner = torch.zeros(many, dtype=torch.int32, device=at.device)
    owner.scatter_(0, sets.long(), of[0])
    found = torch.empty_like(where)
    with on(at):
        _find_columns[cdiv(each, 128), many, heads](
            where, found, owner, at, counts, each, steps,
            KV_HEADS=kv_heads, PER=heads // kv_heads, UNITS_PAD=padded_units(*counts.shape),
            ROWS=ROWS, BLOCK=128, num_warps=4,
        )  # fmt: skip
    return where, found, sets


def list_rows(
    sizes: tuple[int, int], begin: int, many: int, blocks: Tensor, edges: Tensor, at: Tensor,
    counts: Tensor, segments: Segments, of: Tensor, window: int, steps: int, kv_heads: int,
    tile: int, shape: tuple[int, int, int],
) -> Lists:  # fmt: skip
    """Lists for `many` parts of tiles from tile `begin` on.

    `sizes` bound both lists, `shape` has the queries of a part, the keys of a whole step and those
    of another.
    """
    choosing, width, device = blocks.shape[0], blocks.shape[2], at.device
    lists = Lists(
        torch.empty(choosing, many, sizes[0], dtype=torch.int32, device=device),
        torch.empty(choosing, many, sizes[1], dtype=torch.int64, device=device),
        torch.empty(choosing, many, 5, dtype=torch.int32, device=device),
    )
    with on(at):
        _plan[many, choosing](
            blocks, edges, at, counts, segments.cu_q_dev, segments.start_dev, of, *lists, begin,
            window, width, of.shape[1], steps, *sizes,
            KV_HEADS=kv_heads, PER=choosing // kv_heads, UNITS_PAD=padded_units(*counts.shape),
            ROWS=ROWS, TILE=tile, QUERIES=shape[0], KEYS_=shape[1], REST=shape[2],
            BLOCK=min(1024, power_of_two(width)), num_warps=4,
        )  # fmt: skip
    return lists


@triton.jit(do_not_specialize=["width", "tile", "steps"])
def _edges(
    at, counts, edges, width, tile, steps,
    UNITS_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row at which each block of a head begins."""
    unit = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    far = first_row(counts, unit, UNITS_PAD, ROWS)
    before = rows_before(at + far, tl.load(counts + unit), j * tile, steps)
    tl.store(edges + unit.to(tl.int64) * (width + 1) + j, far.to(tl.int32) + before, j <= width)


@triton.jit(do_not_specialize=["each", "steps"])
def _find_columns(
    where, found, owner, at, counts, each, steps,
    KV_HEADS: tl.constexpr, PER: tl.constexpr, UNITS_PAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of positions in a head; -1 where it stores none."""
    unit = tl.load(owner + tl.program_id(1)) * KV_HEADS + tl.program_id(2) // PER
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * each
    place = tl.load(where + offset + k, mask=k < each, other=0)  # [K]
    far = first_row(counts, unit, UNITS_PAD, ROWS)
    count = tl.load(counts + unit)
    row = rows_before(at + far, count, place, steps)
    there = tl.load(at + far + row, mask=row < count, other=-1) == place
    tl.store(found + offset + k, tl.where(there, far.to(tl.int32) + row, -1), mask=k < each)


@triton.jit
def tile_of(of, cu_q, start, nth, many, begin, TILE: tl.constexpr, QUERIES: tl.constexpr):
    """The sequence of a part of a tile, the tile in the call and in the sequence, its positions."""
    PARTS: tl.constexpr = TILE // QUERIES
    tile = begin + nth // PARTS
    b = tl.load(of + tile)
    number = tl.load(of + many + tile)
    first = number * TILE + nth % PARTS * QUERIES
    low = tl.load(start + b)
    high = low + tl.load(cu_q + b + 1) - tl.load(cu_q + b)
    return b, tile, number, first, tl.maximum(first, low), tl.minimum(first + QUERIES, high)


@triton.jit(do_not_specialize=["begin", "width", "many", "steps", "most_whole", "most_rest"])
def _plan(
    blocks, edges, at, counts, cu_q, start, of, whole, rest, found, begin, window, width,
    many, steps, most_whole, most_rest,
    KV_HEADS: tl.constexpr, PER: tl.constexpr, UNITS_PAD: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS_: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists what a part of a tile reads without a mask: whole steps of keys, and what is left."""
    nth = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, tile, number, _, here, stop = tile_of(of, cu_q, start, nth, many, begin, TILE, QUERIES)
    unit = b * KV_HEADS + tl.program_id(1) // PER
    far = first_row(counts, unit, UNITS_PAD, ROWS)
    count = tl.load(counts + unit)
    cuts = tl.where(tl.arange(0, 2) == 0, here - window + 1, stop - window)
    limits = rows_before(at + far, count, cuts, steps) + far.to(tl.int32)
    plain = tl.min(limits, 0)  # rows that are out of every query's window
    some = tl.max(limits, 0)
    slot = head * tl.num_programs(0) + nth
    whole += slot * most_whole
    rest += slot * most_rest
    j = tl.arange(0, BLOCK)
    wholes = plain * 0
    rests = plain * 0
    edges += unit.to(tl.int64) * (width + 1)
    blocks += (head * many + tile) * width
    for low in range(0, number + 1, BLOCK):
        block = low + j
        there = tl.load(blocks + block, mask=block <= number, other=0) != 0
        first = tl.load(edges + block, mask=there, other=0)
        last = tl.minimum(tl.load(edges + block + 1, mask=there, other=0), plain)
        rows = tl.where(there, tl.maximum(last - first, 0), 0)
        steps_ = rows // KEYS_
        left = rows - steps_ * KEYS_
        lefts = (left + REST - 1) // REST
        to = wholes + tl.cumsum(steps_, 0) - steps_
        for n in range(0, (TILE + KEYS_ - 1) // KEYS_):
            tl.store(whole + to + n, first + n * KEYS_, mask=n < steps_)
        to = rests + tl.cumsum(lefts, 0) - lefts
        first += steps_ * KEYS_
        for n in range(0, (KEYS_ + REST - 1) // REST):
            code = (first + n * REST).to(tl.int64) * 256 + tl.minimum(left - n * REST, REST)
            tl.store(rest + to + n, code, mask=n < lefts)
        wholes += tl.sum(steps_, 0)
        rests += tl.sum(lefts, 0)
    tl.store(found + slot * 5, wholes)
    tl.store(found + slot * 5 + 1, rests)
    tl.store(found + slot * 5 + 2, plain)
    tl.store(found + slot * 5 + 3, some)
    padded = (count + ROWS - 1) // ROWS * ROWS
    tl.store(found + slot * 5 + 4, far.to(tl.int32) + tl.maximum(padded - ROWS, 0))
