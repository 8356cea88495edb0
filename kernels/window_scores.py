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
from ._math import dot
from ._pages import KEYS, META, find, page_offset, token_rows
from ._softmax import LOG2E, capped, factors, level_of, weigh

_POSITION_MASK = tl.constexpr(POSITION_MASK)
_LOG2E = tl.constexpr(LOG2E)
_SPLIT = 2048  # keys that one program of the first pass looks at
_PARTS = 16  # partial sums that are added at once
_MEAN, _MAX, _EACH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
    check_dtype("window_scores", "queries", queries)
    check_asked("window_scores", queries.shape[1], softcap, sinks)
    check_dims("window_scores", queries.shape[3])
    batch, kv_heads, slots, dim = ring.k.shape
    query_heads, query_slots = queries.shape[1:3]
    units, groups, size = batch * kv_heads, query_heads // kv_heads, pages.k.shape[1]
    width, rows = heads.table.shape[2] * size, groups * observation
    mass = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=queries.device)
    if not mass.numel():
        return mass
    table, counts = dense_last(heads.table), dense_last(heads.counts)
    ring_k, ring_q = dense_last(ring.k), dense_last(queries)
    tile = choose_tile(dot_size(dim), ring_q.element_size(), shared_memory(ring_q.device))
    mode = 0 if group == "mean" else 2 if normalize == "global" else 1
    near = int(normalize == "visible")
    parts = cdiv(width, _SPLIT) + near
    part = torch.empty(units, parts, rows, dtype=torch.float32, device=ring_q.device)
    lse = torch.empty(units, rows, dtype=torch.float32, device=ring_q.device)
    sizes = dict(
        SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, GROUP=groups,
        OBSERVED=observation, QUERY_SLOTS=query_slots, DIM=dim, DIM_PAD=dot_size(dim),
        # Stored tokens have left the window: only older queries can lie before some of them.
        CAUSAL=observation > window,
    )  # fmt: skip
    row_tile = min(tile.held, dot_size(rows))
    query_tile = min(tile.streamed, dot_size(rows if mode == 0 else observation))
    strides = (table.stride(), counts.stride(), ring_q.stride())
    scale, cap = factors(scale, softcap)
    sinks = None if sinks is None else sinks.contiguous()
    with on(ring_q):
        _row_sums[cdiv(rows, row_tile), parts, units](
            pages.k, pages.meta, pages.slabs, table, counts, ring_k, ring_q, lengths, part,
            window, scale, cap, parts, *strides, ring_k.stride(),
            **sizes, SLOTS=slots, NEAR=near, SPLIT=_SPLIT, QUERIES=row_tile, KEYS_=tile.streamed,
            # Page id, slab and key are loads in a row, each as many steps ahead of the next.
            STAGES=3 * (tile.stages - 1) + 1, num_warps=tile.warps,
        )  # fmt: skip
        _add_parts[cdiv(rows, 128), units](
            part, lse, parts, rows, sinks, HEADS=kv_heads, OBSERVED=observation, PARTS=_PARTS,
            BLOCK=128, num_warps=4,
        )  # fmt: skip
        _column_sums[cdiv(width, tile.held), units](
            pages.k, pages.meta, pages.slabs, table, counts, ring_q, lengths, lse, mass, width,
            scale, cap, *strides,
            **sizes, MODE=mode, QUERIES=query_tile, KEYS_=tile.held, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(mass, kernel, 1, kernel // 2)


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
def _logits(q, k, scale, cap):
    """Logits `[M, N]` of queries and keys, and what is left to multiply them with."""
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if cap is not None:
        scores = capped(scores, scale, cap, q.dtype == tl.float32)
        scale = 1.0
    return scores, scale


@triton.jit
def _row_sums(
    pages_k, pages_meta, slabs, table, counts, ring_k, ring_q, lengths, part, window, scale, cap,
    parts, table_strides, counts_strides, query_strides, ring_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    OBSERVED: tl.constexpr, QUERY_SLOTS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr, SLOTS: tl.constexpr,
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
    d = tl.arange(0, DIM_PAD)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if low < 0:
        ring_k += b * ring_strides[0] + head * ring_strides[1]
        for start in tl.range(0, window, KEYS_, num_stages=1):
            where = length - window + start + n
            there = (where >= 0) & (where < length)
            slot = tl.where(there, where, 0) % SLOTS
            mask = there[:, None] & (d < DIM)[None, :]
            from_k = ring_k + slot[:, None] * ring_strides[2] + d[None, :]
            k = tl.load(from_k, mask=mask, other=0.0)  # [N, D]
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


@triton.jit
def _add_parts(
    part, lse, parts, rows, sinks, HEADS: tl.constexpr, OBSERVED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps over all keys and the sink; +inf, so that weights are 0, where none was seen."""
    unit = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PARTS)
    part += unit * parts * rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        mask = (start + p < parts)[:, None] & (r < rows)[None, :]
        at = part + (start + p)[:, None] * rows + r[None, :]
        level = tl.load(at, mask=mask, other=float("-inf"))  # [PARTS, M]
        _, _, top, total = weigh(level, 1.0, top, total, 0, True)
    level = level_of(top, total)
    if sinks is not None:
        head = unit % HEADS * (rows // OBSERVED) + r // OBSERVED
        sink = tl.load(sinks + head, mask=r < rows, other=0.0).to(tl.float32) * _LOG2E  # [M]
        _, _, top, total = weigh(sink[None, :], 1.0, top, total, 0, True)
        level = tl.where(level > float("-inf"), level_of(top, total), level)
    tl.store(lse + unit * rows + r, tl.where(level > float("-inf"), level, float("inf")), r < rows)


@triton.jit
def _column_sums(
    pages_k, pages_meta, slabs, table, counts, ring_q, lengths, lse, mass, width, scale, cap,
    table_strides, counts_strides, query_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    OBSERVED: tl.constexpr, QUERY_SLOTS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Weights of a block of keys summed over queries, combined over the group's heads by MODE."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n = tl.program_id(0) * KEYS_ + tl.arange(0, KEYS_)
    mass += unit * width + n
    count = tl.load(counts + b * counts_strides[0] + head)
    if tl.program_id(0) * KEYS_ >= count:
        tl.store(mass, tl.zeros([KEYS_], tl.float32), mask=n < width)
        return
    table += b * table_strides[0] + head * table_strides[1]
    k, where = _keys(
        pages_k, pages_meta, slabs, table, n, count,
        SLAB_PAGES, PAGE, DIM, DIM_PAD, True, CAUSAL,
    )  # fmt: skip
    length = tl.load(lengths + b).to(tl.int32)
    rows: tl.constexpr = GROUP * OBSERVED
    lse += unit * rows
    # One head's queries after another ("max"), all of them as one ("mean"), or the same queries of
    # all heads after one another ("max" of each query's weights).
    tiles: tl.constexpr = ((rows if MODE == _MEAN else OBSERVED) + QUERIES - 1) // QUERIES
    steps: tl.constexpr = tiles if MODE == _MEAN else tiles * GROUP
    m = tl.arange(0, QUERIES)
    total = tl.zeros([KEYS_], tl.float32)
    best = tl.zeros([KEYS_], tl.float32)
    largest = tl.zeros([KEYS_, QUERIES], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        if MODE == _MEAN:
            r = step * QUERIES + m
            there = r < rows
            g, i = r // OBSERVED, r % OBSERVED
        else:
            turn = step % GROUP if MODE == _EACH else step // tiles
            tile = step // GROUP if MODE == _EACH else step % tiles
            i = tile * QUERIES + m
            there = i < OBSERVED
            g = m * 0 + turn
            r = g * OBSERVED + i
        q = _queries(
            ring_q, query_strides, b, head, g, i, there, length,
            OBSERVED, QUERY_SLOTS, GROUP, DIM, DIM_PAD,
        )  # fmt: skip
        level = tl.load(lse + r, mask=there, other=float("inf"))  # [M]
        scores, factor = _logits(k, q, scale, cap)  # [N, M]
        # The maximum replaces NaN: a query that met one weighs nothing.
        weights = tl.maximum(tl.exp2(scores * factor - level[None, :]), 0.0)
        if CAUSAL:
            weights = tl.where(where[:, None] <= (length - OBSERVED + i)[None, :], weights, 0.0)
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
    seen = tl.minimum(tl.maximum(length, 1), OBSERVED)
    if MODE == _MEAN:
        seen *= GROUP
    tl.store(mass, tl.where(n < count, total / seen, 0.0), mask=n < width)
