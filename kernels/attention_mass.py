"""What queries gave the tokens: log-sum-exps of queries, then columns of weights added up.

As `window_scores`, for any queries and with numbers that change in place. The first pass keeps a
tile of rows (the queries of a group's heads, head after head) and streams keys past it: of recent
tokens as one part, of global ones as one more, or as several where there are few queries. The
second pass keeps a block of keys and walks over the queries that can see it, so that one program
owns a number and nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, Heads, Numbers, Pages, Ring, check_asked
from ._launch import (
    cdiv,
    check_dense,
    check_dims,
    check_dtype,
    dense_last,
    dot_size,
    on,
    shared_memory,
)
from ._levels import add_levels
from ._softmax import factors, level_of, weigh
from .window_scores import _keys, _logits, choose_tile

_ADMITTED = tl.constexpr(ADMITTED)
_SPLIT = 2048  # keys that one program of the first pass looks at where queries are few
_FEW = 64  # queries that are few
# Numbers that differ from call to call, and tensors that begin at a row of a batch's.
_LENGTHS = ["most", "query_slots", "query_shift", "key_shift", "slots", "flags_b", "flags_h"]
_OF_ROW = ["counts", "flags", "lengths", "first", "last"]


def attention_mass(
    numbers: Numbers,
    pages: Pages,
    heads: Heads,
    ring: Ring,
    query: Tensor,
    lengths: Tensor,
    first: Tensor,
    last: Tensor,
    window: int,
    scale: float,
    *,
    most: int,
    accumulates: str,
    group: str,
    shifts: tuple[int, int] = (0, 0),
    among: tuple[int, int, int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Adds to numbers the weights that queries give; see `Ops.attention_mass`."""
    check_dtype("attention_mass", "query", query)
    check_asked("attention_mass", query.shape[1], softcap, sinks, chunk)
    check_dims("attention_mass", query.shape[3])
    check_dense("attention_mass", stored=numbers.stored, recent=numbers.recent)
    batch, kv_heads, slots, dim = ring.k.shape
    units, groups, size = batch * kv_heads, query.shape[1] // kv_heads, pages.k.shape[1]
    width, rows = min(numbers.stored.shape[2], heads.table.shape[2] * size), groups * most
    if not rows or not units:
        return
    ring_k, flags, query = dense_last(ring.k), dense_last(ring.flags), dense_last(query)
    split = _SPLIT if most <= _FEW else max(width, 1)
    parts = 1 + cdiv(width, split)
    part = torch.empty(units, parts, rows, dtype=torch.float32, device=query.device)
    tile = choose_tile(dot_size(dim), query.element_size(), shared_memory(query.device))
    scale, cap = factors(scale, softcap)
    places = (
        pages.k, pages.meta, pages.slabs, heads.table, heads.counts, ring_k, flags, query, lengths,
        first, last, most, window, scale, cap, chunk, among, query.shape[2], *shifts, slots,
        *flags.stride()[:2], heads.table.stride(), heads.counts.stride(), ring_k.stride(),
        query.stride(),
    )  # fmt: skip
    sizes = dict(
        SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, GROUP=groups, DIM=dim,
        DIM_PAD=dot_size(dim), num_warps=tile.warps,
    )  # fmt: skip
    row_tile, query_tile = min(tile.held, dot_size(rows)), min(tile.streamed, dot_size(most))
    how = dict(
        QUERIES=query_tile, KEYS_=tile.held, STAGES=tile.stages,
        LARGEST=accumulates == "max", WIDEST=group == "max", MEAN=group == "mean",
    )  # fmt: skip
    with on(query):
        _query_levels[cdiv(rows, row_tile), parts, units](
            part, parts, split, *places, **sizes, QUERIES=row_tile, KEYS_=tile.streamed,
            STAGES=3 * (tile.stages - 1) + 1,
        )  # fmt: skip
        lse = add_levels(part, sinks, kv_heads, most)
        for near, target, tokens in (
            (False, numbers.stored, width), (True, numbers.recent, slots),
        ):  # fmt: skip
            if tokens:
                _columns[cdiv(tokens, tile.held), units](
                    lse, target, *target.stride()[:2], *places, **sizes, **how, NEAR=near
                )


@triton.jit
def _rows(
    query, b, head, g, at, asked, query_slots, query_shift, query_strides,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Queries of heads g of a KV head at these positions: `[M, D]`, zeros where not `asked`."""
    d = tl.arange(0, DIM_PAD)
    slot = (tl.where(asked, at - query_shift, 0) % query_slots).to(tl.int64)
    query += b * query_strides[0]
    own = query + (head * GROUP + g) * query_strides[1] + slot * query_strides[2]
    return tl.load(own[:, None] + d[None, :], mask=asked[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _recent(
    ring_k, flags, b, head, where, there, length, window, key_shift, slots, flags_b, flags_h,
    ring_strides, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Keys `[N, D]` of recent tokens at these positions, which are no global ones, and slots."""
    d = tl.arange(0, DIM_PAD)
    slot = tl.where(there, where - key_shift, 0) % slots
    own = flags + b * flags_b + head * flags_h + slot
    bits = tl.load(own, mask=there, other=0)
    there = there & ((where >= length - window) | ((bits & _ADMITTED) == 0))
    ring_k += b * ring_strides[0] + head * ring_strides[1]
    from_k = ring_k + slot.to(tl.int64)[:, None] * ring_strides[2] + d[None, :]
    k = tl.load(from_k, mask=there[:, None] & (d < DIM)[None, :], other=0.0)
    return k, there, slot


@triton.jit
def _among(where, among):
    """Whether tokens at these positions are among those that queries see."""
    looked = (where >= among[1]) & (where < among[2])
    return looked | (where < among[0]) | (where >= among[3])


# Recent tokens of a prompt are as many as it has: it is compiled once for all lengths.
@triton.jit(do_not_specialize=["parts", "split", *_LENGTHS], do_not_specialize_on_alignment=_OF_ROW)
def _query_levels(
    part, parts, split, pages_k, pages_meta, slabs, table, counts, ring_k, flags, query, lengths,
    first, last, most, window, scale, cap, chunk, among, query_slots, query_shift, key_shift,
    slots, flags_b, flags_h, table_strides, counts_strides, ring_strides, query_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS_: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a tile of rows over one part of the keys; part 0 are the recent tokens."""
    unit = tl.program_id(2).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    r = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    rows = GROUP * most
    to = part + (unit * parts + tl.program_id(1)) * rows + r
    length = tl.load(lengths + b).to(tl.int32)
    at = tl.maximum(tl.load(first + b).to(tl.int32), 0) + r % most
    asked = (r < rows) & (at < tl.load(last + b).to(tl.int32))
    newest = tl.max(tl.where(asked, at, -1), 0)
    oldest = tl.min(tl.where(asked, at, 1 << 30), 0)
    count = tl.load(counts + b * counts_strides[0] + head * counts_strides[1])
    low = (tl.program_id(1) - 1) * split
    high = tl.minimum(tl.minimum(low + split, count), newest + 1)  # token n is not before n
    if (newest < 0) | ((low >= 0) & (low >= high)):
        tl.store(to, tl.full([QUERIES], float("-inf"), tl.float32), mask=r < rows)
        return
    q = _rows(
        query, b, head, r // most, at, asked, query_slots, query_shift, query_strides,
        GROUP, DIM, DIM_PAD,
    )  # fmt: skip
    n = tl.arange(0, KEYS_)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if low < 0:
        begin = tl.maximum(tl.maximum(oldest - window + 1, length - slots), 0)
        for start in tl.range(begin, newest + 1, KEYS_, num_stages=1):
            where = start + n
            k, there, _ = _recent(
                ring_k, flags, b, head, where, where <= newest, length, window, key_shift,
                slots, flags_b, flags_h, ring_strides, DIM, DIM_PAD,
            )  # fmt: skip
            seen = there[None, :] & (where[None, :] <= at[:, None])
            seen = seen & (at[:, None] - where[None, :] < window)
            if chunk is not None:
                seen = seen & (where[None, :] // chunk == at[:, None] // chunk)
            if among is not None:
                seen = seen & _among(where, among)[None, :]
            scores, factor = _logits(q, k, scale, cap)
            scores = tl.where(seen, scores, float("-inf"))  # [M, N]
            _, _, top, total = weigh(scores, factor, top, total, 1, True)
    else:
        table += b * table_strides[0] + head * table_strides[1]
        for start in tl.range(low, high, KEYS_, num_stages=STAGES):
            k, where = _keys(
                pages_k, pages_meta, slabs, table, start + n, count,
                SLAB_PAGES, PAGE, DIM, DIM_PAD, True, True,
            )  # fmt: skip
            seen = (start + n < high)[None, :] & (where[None, :] <= at[:, None])
            if chunk is not None:
                seen = seen & (where[None, :] // chunk == at[:, None] // chunk)
            if among is not None:
                seen = seen & _among(where, among)[None, :]
            scores, factor = _logits(q, k, scale, cap)
            scores = tl.where(seen, scores, float("-inf"))
            _, _, top, total = weigh(scores, factor, top, total, 1, True)
    tl.store(to, level_of(top, total), mask=r < rows)


@triton.jit(
    do_not_specialize=["numbers_b", "numbers_h", *_LENGTHS],
    do_not_specialize_on_alignment=["numbers", *_OF_ROW],
)
def _columns(
    lse, numbers, numbers_b, numbers_h, pages_k, pages_meta, slabs, table, counts, ring_k, flags,
    query, lengths, first, last, most, window, scale, cap, chunk, among, query_slots, query_shift,
    key_shift, slots, flags_b, flags_h, table_strides, counts_strides, ring_strides, query_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS_: tl.constexpr, STAGES: tl.constexpr, LARGEST: tl.constexpr, WIDEST: tl.constexpr,
    MEAN: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Adds what all queries give a block of recent (NEAR) or global tokens to their numbers."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    begin = tl.maximum(tl.load(first + b).to(tl.int32), 0)
    end = tl.load(last + b).to(tl.int32)
    length = tl.load(lengths + b).to(tl.int32)
    count = tl.load(counts + b * counts_strides[0] + head * counts_strides[1])
    block = tl.program_id(0) * KEYS_
    tokens = count
    if NEAR:
        tokens = count * 0 + slots
    if (begin >= end) | (block >= tokens):
        return
    n = block + tl.arange(0, KEYS_)
    numbers += b * numbers_b + head * numbers_h
    if NEAR:
        where = length - slots + n
        there = (where >= 0) & (where < length)
        k, there, slot = _recent(
            ring_k, flags, b, head, where, there, length, window, key_shift,
            slots, flags_b, flags_h, ring_strides, DIM, DIM_PAD,
        )  # fmt: skip
        numbers += slot
        high = tl.minimum(end, length - slots + block + KEYS_ - 1 + window)
    else:
        there = n < count
        k, where = _keys(
            pages_k, pages_meta, slabs, table + b * table_strides[0] + head * table_strides[1], n,
            count, SLAB_PAGES, PAGE, DIM, DIM_PAD, True, True,
        )  # fmt: skip
        numbers += n
        high = end
    low = tl.maximum(begin, tl.min(tl.where(there, where, 1 << 30), 0))
    low = begin + (low - begin) // QUERIES * QUERIES
    m = tl.arange(0, QUERIES)
    lse += unit * GROUP * most
    total = tl.zeros([KEYS_], tl.float32)
    for start in tl.range(low, high, QUERIES, num_stages=STAGES):
        at = start + m
        asked = at < end
        combined = tl.zeros([KEYS_, QUERIES], tl.float32)
        for g in range(GROUP):
            q = _rows(
                query, b, head, m * 0 + g, at, asked, query_slots, query_shift, query_strides,
                GROUP, DIM, DIM_PAD,
            )  # fmt: skip
            level = tl.load(lse + g * most + (at - begin), mask=asked, other=float("inf"))  # [M]
            scores, factor = _logits(k, q, scale, cap)  # [N, M]
            # The maximum replaces NaN: a query that met one weighs nothing.
            weights = tl.maximum(tl.exp2(scores * factor - level[None, :]), 0.0)
            combined = tl.maximum(combined, weights) if WIDEST else combined + weights
        seen = there[:, None] & asked[None, :] & (where[:, None] <= at[None, :])
        if NEAR:
            seen = seen & (at[None, :] - where[:, None] < window)
        if chunk is not None:
            seen = seen & (where[:, None] // chunk == at[None, :] // chunk)
        if among is not None:
            seen = seen & ((where >= among[1]) & (where < among[2]))[:, None]
        combined = tl.where(seen, combined, 0.0)
        if MEAN:
            combined = combined / GROUP
        if LARGEST:
            total = tl.maximum(total, tl.max(combined, 1))
        else:
            total += tl.sum(combined, 1)
    old = tl.load(numbers, mask=there, other=0.0)
    new = tl.maximum(old, total) if LARGEST else old + total
    tl.store(numbers, new, mask=there)
