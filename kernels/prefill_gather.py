"""Global tokens of a prompt call in contiguous rows, and which of them queries read without a mask.

Each tile of queries reads the rows before its window. Blocks of many tiles may leave the rows that
all of their queries see to a dense kernel: rectangles of queries and rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import POSITION_MASK, Bounds, Heads, Pages, Segments
from ._chunks import Cut
from ._flash import Attend
from ._launch import cdiv, dense_last, on, padded_batch, padded_units, power_of_two
from ._pages import KEYS, META, VALUES, find, page_offset, token_rows

_POSITION_MASK = tl.constexpr(POSITION_MASK)
ROWS = 128  # a head's gathered rows start at, and are padded with zeros to, a multiple of this
_MOST_TILES = 65535
_LIMITS = 128  # tiles that one program of the limit kernel serves


class Tile(NamedTuple):
    """Rows (positions times heads) and keys of a tile, warps and pipeline stages.

    With `descriptors` a tile has one head, and the device's copy engine loads its gathered rows;
    `alone`, it has one head too. Else it has the queries of all heads of a group: keys are read
    once for them, and few positions share a tile, so that most of its keys are seen by all.
    `registers` is the most that a thread gets, so that two programs fit where one would.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None
    alone: bool = False

    def heads(self, group: int) -> int:
        """Query heads of a tile: the whole group, or a part of one that is too large."""
        if self.descriptors or self.alone:
            return 1
        return next(n for n in range(min(group, self.rows), 0, -1) if group % n == 0)

    def queries(self, group: int) -> int:
        """Positions of a tile."""
        return self.rows // self.heads(group)

    def fit(self, segments: Segments, group: int) -> Tile:
        """The tile, with one head where a call has more tiles than the second axis of a grid."""
        many = tile_count(segments, self.queries(group)) > _MOST_TILES
        return self._replace(alone=True) if many else self


class Rectangles(NamedTuple):
    """A dense kernel for rectangles, and which ones it gets.

    Blocks of about `queries` (whole tiles of the tile kernel) are whole tiles of FlashAttention-3
    too (128 or 192 queries) where groups are powers of two: 1536 keeps the rows that a tile adds to
    its rectangle few, and the K and V that run at a time shared by many tiles. It reads whole
    blocks of up to `spare` keys: so many rows before the end of a head's rows are left over, that
    no sequence touches another's.

    FlashAttention-3 is faster on such rectangles than the tile kernel (`kvpolicy bench prefill`
    times both ways), but costs four more trips of a query through memory (its copy, and the
    rectangle's output). On an H100 a prompt with 1450 such rows a query took 13 % less with
    rectangles than without; fewer were not tried. Hence `least` rows for a rectangle; `average`
    rows a query and `work` (queries times rows, about 1 ms) for a call. `tile` goes on from a
    rectangle, if another one than the tile kernel alone would use.
    """

    attend: Attend
    queries: int = 1536
    spare: int = 192
    least: int = 1024
    average: int = 1024
    work: int = 1 << 30
    tile: Tile | None = None


class Plan(NamedTuple):
    """Rectangles of a call.

    `taken` `[Hkv, tiles]` counts the rows that a tile's rectangle has read. `bounds` `[4, n + 1]`
    int32 holds first query, first row, queries and rows of each, queries counted over KV heads as
    in `[Hkv * Tq]`; an empty one has no queries.
    """

    attend: Attend
    taken: Tensor
    bounds: Tensor
    queries: int
    rows: int


class Far(NamedTuple):
    """Gathered global tokens: rows k `[N, D]`, v `[N, Dv]` of all heads, and what tiles may read.

    `limits` `[Hkv, tiles]` counts the head's rows before the window of each `tile`, `before` (or
    None) those before its chunk.
    """

    k: Tensor
    v: Tensor
    limits: Tensor
    tile: Tile
    plan: Plan | None = None
    before: Tensor | None = None


def lengths(segments: Segments) -> list[int]:
    """Queries of each sequence."""
    return [b - a for a, b in pairwise(segments.cu_q)]


def tile_count(segments: Segments, queries: int) -> int:
    """Tiles over all sequences."""
    return sum(cdiv(n, queries) for n in lengths(segments))


def gather(
    segments: Segments,
    pages: Pages,
    heads: Heads,
    window: int,
    tile: Tile,
    group: int,
    rectangles: Rectangles | None = None,
    bounds: Bounds | None = None,
    cut: Cut | None = None,
) -> Far | None:
    """The global tokens of all heads in contiguous rows; None if there are none.

    `group` query heads share a KV head. Plans `rectangles` where they pay. `bounds` is what the
    host knows of the counts; without it, it waits for them. `cut` is what became of the call's
    sequences, `segments` then its rows.
    """
    batch, kv_heads = heads.counts.shape
    table, counts = dense_last(heads.table), heads.counts.contiguous()
    most, expected = bounds or (counts.tolist(),) * 2
    longest = max(map(max, most))
    if longest == 0 or not any(lengths(segments)):
        return None
    rows = sum(cdiv(n, ROWS) for row in most for n in row) * ROWS
    pays = rectangles is not None and _pays(rectangles, segments, expected, window, group)
    if rectangles is not None and pays:
        tile = rectangles.tile or tile
    tile = tile.fit(segments, group)
    queries = tile.queries(group)
    tiles = tile_count(segments, queries)
    k, v, at = gather_rows(pages, Heads(table, counts), rows, longest)
    limits = torch.empty(kv_heads, tiles, dtype=torch.int32, device=k.device)
    plan, blocks, span = None, 0, 0
    if rectangles is not None and pays:
        span = max(rectangles.queries // queries, 1) * queries  # whole tiles
        blocks = tile_count(segments, span)
        edges = torch.empty(4, kv_heads * blocks + 1, dtype=torch.int32, device=k.device)
        most_queries = min(span, max(lengths(segments)))
        plan = Plan(rectangles.attend, torch.empty_like(limits), edges, most_queries, longest)
    owner, chunk = (None, None) if cut is None else cut[1:]
    before = None if chunk is None else torch.empty_like(limits)
    each, many = cdiv(max(lengths(segments)), queries), len(segments.start)
    with on(k):
        _limits[cdiv(each, _LIMITS), many * kv_heads](
            at, counts, segments.cu_q_dev, segments.start_dev, limits,
            plan.taken if plan else limits, plan.bounds if plan else limits, window, tiles,
            blocks, rows, longest.bit_length(), many, owner, before, chunk,
            BATCH_PAD=padded_batch(many), HEADS=kv_heads,
            UNITS_PAD=padded_units(batch, kv_heads), QUERIES=queries,
            ROWS=ROWS, SPAN=span, SPARE=rectangles.spare if rectangles and plan else 0,
            LEAST=rectangles.least if rectangles and plan else 0, BLOCK=_LIMITS, num_warps=4,
        )  # fmt: skip
    return Far(k, v, limits, tile, plan, before)


def gather_rows(
    pages: Pages, heads: Heads, rows: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The global tokens of all heads, head after head: k `[rows, D]`, v, positions `[rows]` int32.

    A head's rows start at a multiple of ROWS; none has more than `longest` tokens.
    """
    (batch, kv_heads), (table, counts) = heads.counts.shape, heads
    size, dim, dim_v = *pages.k.shape[1:], pages.v.shape[2]
    k = torch.empty(rows, dim, dtype=pages.k.dtype, device=pages.k.device)
    v = torch.empty(rows, dim_v, dtype=k.dtype, device=k.device)
    at = torch.empty(rows, dtype=torch.int32, device=k.device)
    with on(k):
        _gather[cdiv(longest, ROWS) * (ROWS // 32), batch * kv_heads](
            pages.k, pages.v, pages.meta, pages.slabs, table, counts, k, v, at,
            table.stride(),
            HEADS=kv_heads, UNITS_PAD=padded_units(batch, kv_heads),
            SLAB_PAGES=pages.slab_pages, PAGE=size, DIM=dim, DIM_V=dim_v, DIM_PAD=power_of_two(dim),
            DIM_V_PAD=power_of_two(dim_v), ROWS=ROWS, BLOCK=32, num_warps=4,
        )  # fmt: skip
    return k, v, at


def _pays(
    rectangles: Rectangles, segments: Segments, held: list[list[int]], window: int, group: int
) -> bool:
    """Whether rectangles take enough work, if each head's tokens lie evenly over its sequence."""
    work = 0.0
    for start, n, counts in zip(segments.start, lengths(segments), held, strict=True):
        end = start + n - window
        for count in counts if end > 0 else []:
            density = count / end
            # Queries past the first `low` positions beyond the window find `least` rows.
            low = min(max(start - window, rectangles.least / max(density, 1e-9)), end)
            work += density * (end * end - low * low) / 2 * group
    queries = segments.cu_q[-1] * len(held[0]) * group
    return work >= max(rectangles.average * queries, rectangles.work)


def run_rectangles(
    query: Tensor, k: Tensor, v: Tensor, plan: Plan, segments: Segments, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Outputs `[Hkv * Tq, G, D]` and natural log-sum-exps `[G, Hkv * Tq]` over the planned rows."""
    heads, total, dim = query.shape
    kv_heads, tiles = plan.taken.shape
    group = heads // kv_heads
    # One sequence for each rectangle wants the queries of a KV head in successive rows.
    folded = torch.empty(kv_heads * total, group, dim, dtype=query.dtype, device=query.device)
    batch, together = len(segments.start), tile.heads(group)
    with on(query):
        _fold[heads // together, tiles](
            query, folded, plan.taken, segments.cu_q_dev, tiles, batch, query.stride(),
            BATCH_PAD=padded_batch(batch), GROUP=group, DIM=dim,
            DIM_PAD=power_of_two(dim), TOGETHER=together, QUERIES=tile.queries(group),
            M=tile.rows, num_warps=4,
        )  # fmt: skip
    cu_q, cu_k, used_q, used_k = plan.bounds
    return plan.attend(
        folded, k[:, None], v[:, None], cu_q, cu_k, used_q[:-1], used_k[:-1],
        plan.queries, plan.rows, scale,
    )  # fmt: skip


@triton.jit
def first_row(counts, unit, UNITS_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows of a unit (a head of a sequence) start."""
    units = tl.arange(0, UNITS_PAD)
    held = tl.load(counts + units, mask=units < unit, other=0)  # [UNITS]
    return tl.sum(((held + ROWS - 1) // ROWS * ROWS).to(tl.int64), 0)


@triton.jit
def row_tiles(cu_q, batch, BATCH_PAD: tl.constexpr, QUERIES: tl.constexpr):
    """Tiles of each sequence."""
    b = tl.arange(0, BATCH_PAD)
    low = tl.load(cu_q + b, mask=b < batch, other=0)  # [B]
    high = tl.load(cu_q + b + 1, mask=b < batch, other=0)  # [B]
    return (high - low + QUERIES - 1) // QUERIES


@triton.jit
def find_tile(cu_q, tile, batch, BATCH_PAD: tl.constexpr, QUERIES: tl.constexpr):
    """The sequence of a tile, and the tile's number in it."""
    own = row_tiles(cu_q, batch, BATCH_PAD, QUERIES)
    b = tl.sum((tl.cumsum(own, 0) <= tile).to(tl.int32), 0)
    return b, tile - tl.sum(tl.where(tl.arange(0, BATCH_PAD) < b, own, 0), 0)


@triton.jit(do_not_specialize=["tiles", "batch"])
def _fold(
    query, folded, taken, cu_q, tiles, batch, query_strides,
    BATCH_PAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, TOGETHER: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Copies the tiles that have a rectangle: `[Hq, T, D]` to `[Hkv * T, G, D]`."""
    head = tl.program_id(0).to(tl.int64) * TOGETHER
    tile = tl.program_id(1)
    kv_head = head // GROUP
    if tl.load(taken + kv_head * tiles + tile) == 0:
        return
    b, local = find_tile(cu_q, tile, batch, BATCH_PAD, QUERIES)
    q0 = tl.load(cu_q + b)
    length = tl.load(cu_q + b + 1) - q0
    t = tl.arange(0, M) // TOGETHER
    g = tl.arange(0, M) % TOGETHER
    d = tl.arange(0, DIM_PAD)
    there = (t < QUERIES) & (local * QUERIES + t < length)
    mask = there[:, None] & (d < DIM)[None, :]
    row = (q0 + local * QUERIES + t).to(tl.int64)
    of = (head + g) * query_strides[0] + row * query_strides[1]
    to = (kv_head * tl.load(cu_q + batch) + row) * GROUP + head % GROUP + g
    q = tl.load(query + of[:, None] + d[None, :], mask=mask)  # [M, D]
    tl.store(folded + (to * DIM)[:, None] + d[None, :], q, mask=mask)


@triton.jit
def _gather(
    pages_k, pages_v, pages_meta, slabs, table, counts, k, v, at, table_strides,
    HEADS: tl.constexpr, UNITS_PAD: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies a block of a head's tokens to its rows, and zeros to the rows after the last."""
    unit = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + unit)
    padded = (count + ROWS - 1) // ROWS * ROWS
    if tl.program_id(0) * BLOCK >= padded:
        return
    b = (unit // HEADS).to(tl.int64)
    h = (unit % HEADS).to(tl.int64)
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    there = n < count
    own = table + b * table_strides[0] + h * table_strides[1]
    page, slot = find(own, n, there, PAGE)
    mask = there[:, None] & (d < DIM)[None, :]
    mask_v = there[:, None] & (e < DIM_V)[None, :]
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    from_v = token_rows(pages_v, slabs, page, slot, e, VALUES, SLAB_PAGES, PAGE, DIM_V)
    from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
    row = first_row(counts, unit, UNITS_PAD, ROWS) + n
    to_k = row[:, None] * DIM + d[None, :]
    to_v = row[:, None] * DIM_V + e[None, :]
    real = (d < DIM)[None, :] & (n < padded)[:, None]
    real_v = (e < DIM_V)[None, :] & (n < padded)[:, None]
    tl.store(k + to_k, tl.load(from_k, mask=mask, other=0.0), mask=real)  # [N, D]
    tl.store(v + to_v, tl.load(from_v, mask=mask_v, other=0.0), mask=real_v)  # [N, Dv]
    meta = tl.load(pages_meta + from_meta, mask=there, other=0)  # [N]
    tl.store(at + row, meta & _POSITION_MASK, mask=there)


@triton.jit
def rows_before(at, count, cut, steps):
    """How many of a head's rows have a position before each cut (bisection)."""
    low = tl.zeros_like(cut)
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(at + middle, mask=open_, other=0) < cut  # [T]
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["window", "tiles", "blocks", "rows", "steps", "many", "chunk"])
def _limits(
    at, counts, cu_q, start, limits, taken, bounds, window, tiles, blocks, rows, steps, many, owner,
    skipped, chunk,
    BATCH_PAD: tl.constexpr, HEADS: tl.constexpr, UNITS_PAD: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, SPARE: tl.constexpr,
    LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each tile of a head, its rows before the window of the tile's first query."""
    unit = tl.program_id(1)
    b = unit // HEADS
    h = unit % HEADS
    if owner is not None:
        unit = tl.load(owner + b) * HEADS + h
    batch = tl.arange(0, BATCH_PAD)
    own = row_tiles(cu_q, many, BATCH_PAD, QUERIES)
    before = tl.sum(tl.where(batch < b, own, 0), 0)
    mine = tl.sum(tl.where(batch == b, own, 0), 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    far = first_row(counts, unit, UNITS_PAD, ROWS)
    at += far
    count = tl.load(counts + unit)
    cut = tl.load(start + b) - window + 1
    there = tile < mine
    limit = rows_before(at, count, cut + tile * QUERIES, steps)
    if chunk is not None:  # of which a row of the call sees those from its start on
        begins = tl.load(start + b) // chunk * chunk
        less = rows_before(at, count, begins + tile * 0, steps)
        limit = tl.maximum(limit, less)
        tl.store(skipped + h * tiles + before + tile, less, mask=there)
    tl.store(limits + h * tiles + before + tile, limit, mask=there)
    if SPAN:
        block = tile * QUERIES // SPAN
        shared = rows_before(at, count, cut + block * SPAN, steps)
        shared = tl.maximum(tl.minimum(shared, count - SPARE), 0)
        shared = tl.where(shared < LEAST, 0, shared)
        tl.store(taken + h * tiles + before + tile, shared, mask=there)
        spans = row_tiles(cu_q, many, BATCH_PAD, SPAN)
        to = bounds + h * blocks + tl.sum(tl.where(batch < b, spans, 0), 0) + block
        first = there & (block * SPAN == tile * QUERIES)
        q0 = tl.load(cu_q + b)
        length = tl.load(cu_q + b + 1) - q0
        total = tl.load(cu_q + many)
        queries = tl.where(shared > 0, tl.minimum(length - block * SPAN, SPAN), 0)
        stride = HEADS * blocks + 1
        tl.store(to, h * total + q0 + block * SPAN, mask=first)
        tl.store(to + stride, tl.zeros_like(block) + far.to(tl.int32), mask=first)
        tl.store(to + 2 * stride, queries, mask=first)
        tl.store(to + 3 * stride, shared, mask=first)
        if (unit == 0) & (tl.program_id(0) == 0):
            tl.store(bounds + HEADS * blocks, HEADS * total)
            tl.store(bounds + stride + HEADS * blocks, rows)
