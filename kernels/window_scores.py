"""SnapKV's scores straight from pages: log-sum-exps of the observed queries, then column sums.

The observed queries of a group are rows of one product. The first pass keeps a tile of rows and
streams a fixed split of the keys past it; the parts of a row are added in one order. The second
pass keeps a block of keys, streams all rows past it and sums their weights. Splits and blocks
depend on nothing but a head's own length, so a head scores the same in any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops import POSITION_MASK, Heads, Pages, Ring, check_asked
from ._launch import cdiv, check_dims, check_dtype, dense_last, dot_size, on, shared_memory
from ._levels import add_levels
from ._math import dot
from ._pages import KEYS, META, find, page_offset, token_rows
from ._softmax import capped, factors, level_of, weigh

_POSITION_MASK = tl.constexpr(POSITION_MASK)
_SPLIT = 2048  # keys that one program of the first pass looks at
_MAX, _EACH, _MEAN, _SUM = (tl.constexpr(x) for x in range(4))  # from _MEAN on, all at once


class Tile(NamedTuple):
    """Rows or keys that a program holds, and how many of the other it streams at once."""

    held: int
    streamed: int
    warps: int
    stages: int


def choose_tile(dim: int, itemsize: int, shared: int) -> Tile:
    """The tile for a padded head_dim; where memory allows two programs run beside each other."""
    if dim > 256:
        if itemsize == 4:
            return Tile(16, 16, 4, 2)
        return Tile(64, 32, 8, 3) if shared >= 128 << 10 else Tile(32, 16, 4, 3)
    if itemsize == 4:
        return Tile(64, 32, 4, 2) if dim <= 128 else Tile(32, 32, 4, 2)
    if dim <= 128:
        return Tile(128, 64, 8, 3)
    if shared >= 128 << 10:
        return Tile(128, 64, 8, 3 if shared >= 200 << 10 else 2)
    return Tile(64, 32, 4, 3)


def window_scores(
    pages: Pages,
    heads: Heads,
    ring: Ring,
    queries: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    *,
    observation: int,
    kernel: int,
    pooling: str,
    group: str,
    normalize: str,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores `[B, Hkv, M * P]` by the weights of the last queries; see `Ops.window_scores`."""
    _check("window_scores", queries, softcap, sinks)
    batch, kv_heads = heads.counts.shape
    width = heads.table.shape[2] * pages.k.shape[1]
    mass = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=queries.device)
    if not mass.numel():
        return mass
    each = group == "each" or (group == "max" and normalize == "global")
    mode = _MEAN if group == "mean" else _EACH if each else _MAX
    asked = _Asked(pages, heads, ring, queries, lengths, window, scale, observation, softcap)
    lse = _levels(asked, sinks, normalize == "visible")
    _columns(asked, lse, mass, mode.value)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(mass, kernel, 1, kernel // 2)


def window_masses(
    pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor, window: int,
    scale: float, *, observation: int, squared: bool = False, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of weights `[B, Hkv, M * P]` and `[B, Hkv, window]`; see `Ops.window_masses`."""
    _check("window_masses", queries, softcap, sinks)
    asked = _Asked(pages, heads, ring, queries, lengths, window, scale, observation, softcap)
    far, near = (
        torch.empty(*heads.counts.shape, width, dtype=torch.float32, device=queries.device)
        for width in (asked.width, window)
    )
    if asked.units:
        lse = _levels(asked, sinks, True)
        for mass, recent in ((far, False), (near, True)):
            if mass.numel():
                _columns(asked, lse, mass, _SUM.value, squared, recent)
    return far, near


def _check(op: str, queries: Tensor, softcap: float | None, sinks: Tensor | None) -> None:
    check_dtype(op, "queries", queries)
    check_asked(op, queries.shape[1], softcap, sinks)
    check_dims(op, queries.shape[3])


class _Asked:
    """What both passes are launched with."""

    def __init__(
        self, pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor,
        window: int, scale: float, observation: int, softcap: float | None,
    ) -> None:  # fmt: skip
        batch, self.kv_heads, self.slots, dim = ring.k.shape
        groups, size = queries.shape[1] // self.kv_heads, pages.k.shape[1]
        self.units, self.rows = batch * self.kv_heads, groups * observation
        self.width, self.window, self.lengths = heads.table.shape[2] * size, window, lengths
        table, counts = dense_last(heads.table), dense_last(heads.counts)
        self.stored = pages.k, pages.meta, pages.slabs, table, counts
        self.recent, self.queries = dense_last(ring.k), dense_last(queries)
        self.tile = choose_tile(
            dot_size(dim), queries.element_size(), shared_memory(queries.device)
        )
        self.strides = (
            table.stride(), counts.stride(), self.queries.stride(), self.recent.stride()
        )  # fmt: skip
        self.factors = factors(scale, softcap)
        self.observation = observation
        self.sizes = dict(
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=self.kv_heads, GROUP=groups,
            OBSERVED=observation, QUERY_SLOTS=queries.shape[2], SLOTS=self.slots, DIM=dim,
            DIM_PAD=dot_size(dim),
            # Stored tokens have left the window: only older queries can lie before some of them.
            CAUSAL=observation > window,
        )  # fmt: skip


def _levels(asked: _Asked, sinks: Tensor | None, near: bool) -> Tensor:
    """Log-sum-exps `[U, rows]` to base 2 over the stored keys, the window's too if `near`."""
    tile, rows = asked.tile, asked.rows
    parts = cdiv(asked.width, _SPLIT) + near
    part = torch.empty(asked.units, parts, rows, dtype=torch.float32, device=asked.queries.device)
    row_tile = min(tile.held, dot_size(rows))
    with on(asked.queries):
        _row_sums[cdiv(rows, row_tile), parts, asked.units](
            *asked.stored, asked.recent, asked.queries, asked.lengths, part, asked.window,
            *asked.factors, parts, *asked.strides, **asked.sizes, NEAR=int(near), SPLIT=_SPLIT,
            QUERIES=row_tile, KEYS_=tile.streamed,
            # Page id, slab and key are loads in a row, each as many steps ahead of the next.
            STAGES=3 * (tile.stages - 1) + 1, num_warps=tile.warps,
        )  # fmt: skip
        return add_levels(part, sinks, asked.kv_heads, asked.observation)


def _columns(
    asked: _Asked, lse: Tensor, mass: Tensor, mode: int, squared: bool = False, near: bool = False
) -> None:
    """Fills `mass` `[B, Hkv, n]` with weights of stored tokens, or of the window's if `near`."""
    tile, width = asked.tile, mass.shape[2]
    streamed = asked.rows if mode >= _MEAN.value else asked.observation
    with on(asked.queries):
        _column_sums[cdiv(width, tile.held), asked.units](
            *asked.stored, asked.recent, asked.queries, asked.lengths, lse, mass, width,
            asked.window, *asked.factors, *asked.strides, **asked.sizes, MODE=mode,
            SQUARED=squared, NEAR=near, QUERIES=min(tile.streamed, dot_size(streamed)),
            KEYS_=tile.held, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip


@triton.jit
def _queries(
    ring_q, query_strides, b, head, g, i, there, length,
    OBSERVED: tl.constexpr, QUERY_SLOTS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Queries i of the window, of query heads g of a KV head: `[M, D]`, zeros where none is."""
    d = tl.arange(0, DIM_PAD)
    at = length - OBSERVED + i
    slot = ((at + OBSERVED * QUERY_SLOTS) % QUERY_SLOTS).to(tl.int64)
    ring_q += b * query_strides[0]
    at_q = ring_q + (head * GROUP + g) * query_strides[1] + slot * query_strides[2]
    mask = (there & (at >= 0))[:, None] & (d < DIM)[None, :]
    return tl.load(at_q[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _keys(
    pages_k, pages_meta, slabs, table, n, count,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Keys of a head's tokens n, and their positions (0 unless CAUSAL asks for them)."""
    d = tl.arange(0, DIM_PAD)
    there = n < count
    page, slot = find(table, n, there, PAGE, MASKED)
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    if MASKED:
        k = tl.load(from_k, mask=there[:, None] & (d < DIM)[None, :], other=0.0)  # [N, D]
    elif DIM == DIM_PAD:
        k = tl.load(from_k)
    else:
        k = tl.load(from_k, mask=(d < DIM)[None, :], other=0.0)
    where = n * 0
    if CAUSAL:
        from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
        where = tl.load(pages_meta + from_meta, mask=there, other=0) & _POSITION_MASK  # [N]
    return k, where


@triton.jit
def _recent(
    ring_k, ring_strides, where, there, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Keys `[N, D]` of a head's recent tokens at these positions, zeros where not `there`."""
    d = tl.arange(0, DIM_PAD)
    slot = tl.where(there, where, 0) % SLOTS
    from_k = ring_k + slot[:, None] * ring_strides[2] + d[None, :]
    return tl.load(from_k, mask=there[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _logits(q, k, scale, cap):
    """Logits `[M, N]` of queries and keys, and what is left to multiply them with."""
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if cap is not None:
        scores = capped(scores, scale, cap, q.dtype == tl.float32)
        scale = 1.0
    return scores, scale


@triton.jit(do_not_specialize=["parts"])
def _row_sums(
    pages_k, pages_meta, slabs, table, counts, ring_k, ring_q, lengths, part, window, scale, cap,
    parts, table_strides, counts_strides, query_strides, ring_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    OBSERVED: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, CAUSAL: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr,
    NEAR: tl.constexpr, SPLIT: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a tile of rows over one part of the keys; part 0 is the window if NEAR."""
    unit = tl.program_id(2).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    rows: tl.constexpr = GROUP * OBSERVED
    r = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    g, i = r // OBSERVED, r % OBSERVED
    to = part + (unit * parts + tl.program_id(1)) * rows + r
    count = tl.load(counts + b * counts_strides[0] + head)
    low = (tl.program_id(1) - NEAR) * SPLIT
    if low >= count:
        tl.store(to, tl.full([QUERIES], float("-inf"), tl.float32), mask=r < rows)
        return
    length = tl.load(lengths + b).to(tl.int32)
    q = _queries(
        ring_q, query_strides, b, head, g, i, r < rows, length,
        OBSERVED, QUERY_SLOTS, GROUP, DIM, DIM_PAD,
    )  # fmt: skip
    at = length - OBSERVED + i
    n = tl.arange(0, KEYS_)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if low < 0:
        ring_k += b * ring_strides[0] + head * ring_strides[1]
        for start in tl.range(0, window, KEYS_, num_stages=1):
            where = length - window + start + n
            there = (where >= 0) & (where < length)
            k = _recent(ring_k, ring_strides, where, there, SLOTS, DIM, DIM_PAD)
            seen = there[None, :] & (where[None, :] <= at[:, None])
            scores, factor = _logits(q, k, scale, cap)
            scores = tl.where(seen, scores, float("-inf"))  # [M, N]
            _, _, top, total = weigh(scores, factor, top, total, 1, True)
    else:
        table += b * table_strides[0] + head * table_strides[1]
        high = tl.minimum(low + SPLIT, count)
        whole = low
        if not CAUSAL:
            whole = low + (high - low) // KEYS_ * KEYS_
            for start in tl.range(low, whole, KEYS_, num_stages=STAGES):
                k, where = _keys(
                    pages_k, pages_meta, slabs, table, start + n, count,
                    SLAB_PAGES, PAGE, DIM, DIM_PAD, False, False,
                )  # fmt: skip
                scores, factor = _logits(q, k, scale, cap)
                _, _, top, total = weigh(scores, factor, top, total, 1, False)
        for start in tl.range(whole, high, KEYS_, num_stages=STAGES if CAUSAL else 1):
            k, where = _keys(
                pages_k, pages_meta, slabs, table, start + n, count,
                SLAB_PAGES, PAGE, DIM, DIM_PAD, True, CAUSAL,
            )  # fmt: skip
            seen = (start + n < count)[None, :] & (where[None, :] <= at[:, None])
            if not CAUSAL:
                seen = (start + n < count)[None, :]
            scores, factor = _logits(q, k, scale, cap)
            scores = tl.where(seen, scores, float("-inf"))
            _, _, top, total = weigh(scores, factor, top, total, 1, True)
    tl.store(to, level_of(top, total), mask=r < rows)


@triton.jit(do_not_specialize=["width"])
def _column_sums(
    pages_k, pages_meta, slabs, table, counts, ring_k, ring_q, lengths, lse, mass, width, window,
    scale, cap, table_strides, counts_strides, query_strides, ring_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    OBSERVED: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, CAUSAL: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, SQUARED: tl.constexpr, NEAR: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Weights of a block of stored keys (NEAR: the window's), or their squares, over queries.

    Combined over the group's heads by MODE.
    """
    ONE: tl.constexpr = MODE >= _MEAN
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n = tl.program_id(0) * KEYS_ + tl.arange(0, KEYS_)
    mass += unit * width + n
    length = tl.load(lengths + b).to(tl.int32)
    if NEAR:
        ring_k += b * ring_strides[0] + head * ring_strides[1]
        where = length - window + n
        there = (n < window) & (where >= 0)
        k = _recent(ring_k, ring_strides, where, there, SLOTS, DIM, DIM_PAD)
    else:
        count = tl.load(counts + b * counts_strides[0] + head)
        if tl.program_id(0) * KEYS_ >= count:
            tl.store(mass, tl.zeros([KEYS_], tl.float32), mask=n < width)
            return
        table += b * table_strides[0] + head * table_strides[1]
        k, where = _keys(
            pages_k, pages_meta, slabs, table, n, count,
            SLAB_PAGES, PAGE, DIM, DIM_PAD, True, CAUSAL,
        )  # fmt: skip
        there = n < count
    rows: tl.constexpr = GROUP * OBSERVED
    lse += unit * rows
    # One head's queries after another ("max"), all of them as one ("mean"), or the same queries of
    # all heads after one another ("max" of each query's weights).
    tiles: tl.constexpr = ((rows if ONE else OBSERVED) + QUERIES - 1) // QUERIES
    steps: tl.constexpr = tiles if ONE else tiles * GROUP
    m = tl.arange(0, QUERIES)
    total = tl.zeros([KEYS_], tl.float32)
    best = tl.zeros([KEYS_], tl.float32)
    largest = tl.zeros([KEYS_, QUERIES], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        if ONE:
            r = step * QUERIES + m
            asked = r < rows
            g, i = r // OBSERVED, r % OBSERVED
        else:
            turn = step % GROUP if MODE == _EACH else step // tiles
            tile = step // GROUP if MODE == _EACH else step % tiles
            i = tile * QUERIES + m
            asked = i < OBSERVED
            g = m * 0 + turn
            r = g * OBSERVED + i
        q = _queries(
            ring_q, query_strides, b, head, g, i, asked, length,
            OBSERVED, QUERY_SLOTS, GROUP, DIM, DIM_PAD,
        )  # fmt: skip
        level = tl.load(lse + r, mask=asked, other=float("inf"))  # [M]
        scores, factor = _logits(k, q, scale, cap)  # [N, M]
        # The maximum replaces NaN: a query that met one weighs nothing.
        weights = tl.maximum(tl.exp2(scores * factor - level[None, :]), 0.0)
        if CAUSAL or NEAR:
            weights = tl.where(where[:, None] <= (length - OBSERVED + i)[None, :], weights, 0.0)
        if SQUARED:
            weights = weights * weights
        if MODE == _EACH:
            largest = tl.maximum(largest, weights)
            if turn == GROUP - 1:
                total += tl.sum(largest, 1)
                largest = tl.zeros([KEYS_, QUERIES], tl.float32)
        else:
            total += tl.sum(weights, 1)
        if MODE == _MAX:
            best = tl.maximum(best, total)
            total = tl.where(tile == tiles - 1, 0.0, total)
    if MODE == _MAX:
        total = best
    if MODE != _SUM:
        seen = tl.minimum(tl.maximum(length, 1), OBSERVED)
        if MODE == _MEAN:
            seen *= GROUP
        total = total / seen
    tl.store(mass, tl.where(there, total, 0.0), mask=n < width)
