"""Attention of a prompt call: admitted tokens that left the window, and the band of recent ones.

The global tokens of a layer are gathered once into contiguous rows, head after head. A tile of
queries starting at position s then reads the rows before s - window + 1 without a mask, and the
recent keys from there on, with the exact mask where the tile needs one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..types import ADMITTED, POSITION_MASK, Pages, Segments
from ._launch import cdiv, check_dtype, dense_last, dot_size, on, power_of_two, shared_memory
from ._math import dot, narrow
from ._slabs import KEYS, META, VALUES, page_offset

_ADMITTED = tl.constexpr(ADMITTED)
_POSITION_MASK = tl.constexpr(POSITION_MASK)
_LOG2E = 1.4426950408889634
_ROWS = 128  # a head's gathered rows start at, and are padded with zeros to, a multiple of this
_LIMITS = 128  # tiles that one program of the limit kernel serves


class Far(NamedTuple):
    """Gathered global tokens: rows `[N, D]` of all heads, and what each tile of a head may read.

    `limits` `[Hkv, tiles]` counts the head's rows before the tile's window.
    """

    k: Tensor
    v: Tensor
    limits: Tensor


class Tile(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages; how gathered rows are loaded."""

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    pages: Pages,
    table: Tensor,
    counts: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Attention over {j <= i : i - j < window or admitted[j]} `[Hq, Tq, D]`; see the reference.

    Waits for the device once, to learn how many rows the gathered tokens need.
    """
    check_dtype("prefill_attention", "query", query)
    dim = query.shape[2]
    tile = choose_tile(dot_size(dim), query.element_size(), shared_memory(query.device))
    far = None
    reach = max(start + n for start, n in zip(segments.start, _lengths(segments), strict=True))
    if counts.numel() and reach > window:
        far = gather(segments, pages, table, counts, window, tile)
    return attend(query, key, value, flags, segments, counts, far, window, scale, tile)


def choose_tile(dim: int, itemsize: int, shared: int) -> Tile:
    """The tile for a padded head_dim, an element size and the shared memory of a program."""
    if itemsize == 4:
        return Tile(64, 32, 8, 2) if dim <= 128 else Tile(32, 16, 4, 2)
    if shared >= 200 << 10:
        # These devices have a unit that copies whole tiles (TMA).
        return Tile(128, 128, 8, 3, True) if dim <= 128 else Tile(128, 64, 8, 2, True)
    if shared >= 128 << 10:
        return Tile(128, 64, 8, 3) if dim <= 128 else Tile(64, 64, 8, 2)
    if dim <= 64:
        return Tile(128, 64, 4, 3)
    return Tile(128, 64, 8, 2) if dim <= 128 else Tile(64, 32, 8, 2)


def _lengths(segments: Segments) -> list[int]:
    """Queries of each sequence."""
    return [b - a for a, b in pairwise(segments.cu_q)]


def _tile_count(segments: Segments, tile: Tile) -> int:
    """Tiles over all sequences."""
    return sum(cdiv(n, tile.queries) for n in _lengths(segments))


def gather(
    segments: Segments, pages: Pages, table: Tensor, counts: Tensor, window: int, tile: Tile
) -> Far | None:
    """The global tokens of all heads in contiguous rows; None if there are none."""
    batch, heads = counts.shape
    table, counts = dense_last(table), counts.contiguous()
    held = [n for row in counts.tolist() for n in row]
    longest = max(held)
    if longest == 0 or not any(_lengths(segments)):
        return None
    size, dim = pages.k.shape[1:]
    rows = sum(cdiv(n, _ROWS) for n in held) * _ROWS
    tiles = _tile_count(segments, tile)
    k = torch.empty(rows, dim, dtype=pages.k.dtype, device=pages.k.device)
    v = torch.empty_like(k)
    at = torch.empty(rows, dtype=torch.int32, device=k.device)
    limits = torch.empty(heads, tiles, dtype=torch.int32, device=k.device)
    most = cdiv(max(_lengths(segments)), tile.queries)
    with on(k):
        _gather[cdiv(longest, _ROWS) * (_ROWS // 32), batch * heads](
            pages.k, pages.v, pages.meta, pages.slabs, table, counts, k, v, at,
            table.stride(0), table.stride(1),
            HEADS=heads, UNITS_PAD=power_of_two(batch * heads), SLAB_PAGES=pages.slab_pages,
            PAGE=size, DIM=dim, DIM_PAD=power_of_two(dim), ROWS=_ROWS, BLOCK=32, num_warps=4,
        )  # fmt: skip
        _limits[cdiv(most, _LIMITS), batch * heads](
            at, counts, segments.cu_q_dev, segments.start_dev, limits, window, tiles,
            longest.bit_length(), BATCH=batch, BATCH_PAD=power_of_two(batch), HEADS=heads,
            UNITS_PAD=power_of_two(batch * heads), QUERIES=tile.queries, ROWS=_ROWS,
            BLOCK=_LIMITS, num_warps=4,
        )  # fmt: skip
    return Far(k, v, limits)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    counts: Tensor,
    far: Far | None,
    window: int,
    scale: float,
    tile: Tile,
) -> Tensor:
    """The tile kernel on gathered rows and recent keys. Returns `[Hq, Tq, D]`."""
    heads, total, dim = query.shape
    batch = len(segments.start)
    out = torch.empty(total, heads, dim, dtype=query.dtype, device=query.device)
    tiles = _tile_count(segments, tile)
    if not tiles:
        return out.transpose(0, 1)
    query, key, value = dense_last(query), dense_last(key), dense_last(value)
    flags, counts = dense_last(flags), counts.contiguous()
    units = batch * key.shape[0]
    far_k, far_v, limits = far or (key, value, counts)
    # A descriptor's rows are whole units of 16 bytes.
    descriptors = far is not None and tile.descriptors and dim * query.element_size() % 16 == 0
    if descriptors:
        shape = [tile.keys, dot_size(dim)]
        far_k, far_v = (TensorDescriptor.from_tensor(rows, shape) for rows in (far_k, far_v))
    with on(query):
        _attend[heads, tiles](
            query, key, value, flags, far_k, far_v, limits, counts, out,
            segments.cu_q_dev, segments.cu_k_dev, segments.start_dev, window, scale * _LOG2E, tiles,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), flags.stride(0), out.stride(1), out.stride(0),
            BATCH=batch, BATCH_PAD=power_of_two(batch), KV_HEADS=key.shape[0],
            GROUP=heads // key.shape[0], UNITS_PAD=power_of_two(units), ROWS=_ROWS,
            HAS_FAR=far is not None, DESCRIPTORS=descriptors, DIM=dim, DIM_PAD=dot_size(dim),
            QUERIES=tile.queries, KEYS_=tile.keys, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out.transpose(0, 1)


@triton.jit
def _first_row(counts, unit, UNITS_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows of a unit (a head of a sequence) start."""
    units = tl.arange(0, UNITS_PAD)
    held = tl.load(counts + units, mask=units < unit, other=0)
    return tl.sum(((held + ROWS - 1) // ROWS * ROWS).to(tl.int64), 0)


@triton.jit
def _row_tiles(cu_q, BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, QUERIES: tl.constexpr):
    """Tiles of each sequence."""
    b = tl.arange(0, BATCH_PAD)
    low = tl.load(cu_q + b, mask=b < BATCH, other=0)
    high = tl.load(cu_q + b + 1, mask=b < BATCH, other=0)
    return (high - low + QUERIES - 1) // QUERIES


@triton.jit
def _gather(
    pages_k, pages_v, pages_meta, slabs, table, counts, k, v, at, table_b, table_h,
    HEADS: tl.constexpr, UNITS_PAD: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + unit)
    padded = (count + ROWS - 1) // ROWS * ROWS
    if tl.program_id(0) * BLOCK >= padded:
        return
    b = (unit // HEADS).to(tl.int64)
    h = (unit % HEADS).to(tl.int64)
    d = tl.arange(0, DIM_PAD)
    there = n < count
    page = tl.load(table + b * table_b + h * table_h + n // PAGE, mask=there, other=0)
    slot = n % PAGE
    mask = there[:, None] & (d < DIM)[None, :]
    inside = slot[:, None] * DIM + d[None, :]
    from_k = page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM)
    from_v = page_offset(slabs, page, VALUES, SLAB_PAGES, PAGE * DIM)
    from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE)
    row = _first_row(counts, unit, UNITS_PAD, ROWS) + n
    to = row[:, None] * DIM + d[None, :]
    real = (d < DIM)[None, :] & (n < padded)[:, None]
    tl.store(k + to, tl.load(pages_k + from_k[:, None] + inside, mask=mask, other=0.0), mask=real)
    tl.store(v + to, tl.load(pages_v + from_v[:, None] + inside, mask=mask, other=0.0), mask=real)
    meta = tl.load(pages_meta + from_meta + slot, mask=there, other=0)
    tl.store(at + row, meta & _POSITION_MASK, mask=there)


@triton.jit
def _limits(
    at, counts, cu_q, start, limits, window, tiles, steps,
    BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, HEADS: tl.constexpr, UNITS_PAD: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each tile of a head, its rows before the window of the tile's first query (bisection)."""
    unit = tl.program_id(1)
    b = unit // HEADS
    batch = tl.arange(0, BATCH_PAD)
    own = _row_tiles(cu_q, BATCH, BATCH_PAD, QUERIES)
    before = tl.sum(tl.where(batch < b, own, 0), 0)
    mine = tl.sum(tl.where(batch == b, own, 0), 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cut = tl.load(start + b) + tile * QUERIES - window + 1
    at += _first_row(counts, unit, UNITS_PAD, ROWS)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + tl.load(counts + unit)
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(at + middle, mask=open_, other=0) < cut
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    tl.store(limits + (unit % HEADS) * tiles + before + tile, low, mask=tile < mine)


@triton.jit
def _step(q, k, v, seen, scale, top, total, acc, MASKED: tl.constexpr):
    """One step of the online softmax; logarithms are to base 2."""
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if MASKED:
        scores = tl.where(seen, scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet would compute inf - inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = dot(narrow(weights, v.dtype), v, acc * decay[:, None])
    return new_top, total, acc


@triton.jit
def _rows(base, offsets, d, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Whole rows: masked only where head_dim is padded."""
    if DIM == DIM_PAD:
        return tl.load(base + offsets)
    return tl.load(base + offsets, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def _attend(
    query, key, value, flags, far_k, far_v, limits, counts, out, cu_q, cu_k, start, window, scale,
    tiles, query_h, query_t, key_h, key_t, value_h, value_t, flags_h, out_h, out_t,
    BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    UNITS_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_FAR: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    tile = tiles - 1 - tl.program_id(1)  # the longest tiles first
    kv_head = head // GROUP
    own = _row_tiles(cu_q, BATCH, BATCH_PAD, QUERIES)
    b = tl.sum((tl.cumsum(own, 0) <= tile).to(tl.int32), 0)
    local = tile - tl.sum(tl.where(tl.arange(0, BATCH_PAD) < b, own, 0), 0)
    q0 = tl.load(cu_q + b)
    length = tl.load(cu_q + b + 1) - q0
    k0 = tl.load(cu_k + b)
    end = tl.load(start + b) + length
    first = end - (tl.load(cu_k + b + 1) - k0)  # position of the sequence's first recent key
    here = end - length + local * QUERIES  # position of the tile's first query
    stop = tl.minimum(here + QUERIES, end)

    m = tl.arange(0, QUERIES)
    n = tl.arange(0, KEYS_)
    d = tl.arange(0, DIM_PAD)
    row = (q0 + local * QUERIES).to(tl.int64)
    alive = (local * QUERIES + m < length)[:, None] & (d < DIM)[None, :]
    query += head * query_h + row * query_t
    q = tl.load(query + m[:, None] * query_t + d[None, :], mask=alive, other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM_PAD], tl.float32)

    if HAS_FAR:
        limit = tl.load(limits + kv_head * tiles + tile)
        unit = b * KV_HEADS + kv_head.to(tl.int32)
        far = _first_row(counts, unit, UNITS_PAD, ROWS)
        inside = n[:, None] * DIM + d[None, :]
        whole = limit // KEYS_ * KEYS_
        for at in tl.range(0, whole, KEYS_, num_stages=STAGES):
            if DESCRIPTORS:
                k = far_k.load([(far + at).to(tl.int32), 0])
                v = far_v.load([(far + at).to(tl.int32), 0])
            else:
                k = _rows(far_k + (far + at) * DIM, inside, d, DIM, DIM_PAD)
                v = _rows(far_v + (far + at) * DIM, inside, d, DIM, DIM_PAD)
            top, total, acc = _step(q, k, v, True, scale, top, total, acc, False)
        if whole < limit:
            # The rows up to the next multiple of ROWS are other tokens or zeros.
            if DESCRIPTORS:
                k = far_k.load([(far + whole).to(tl.int32), 0])
                v = far_v.load([(far + whole).to(tl.int32), 0])
            else:
                k = _rows(far_k + (far + whole) * DIM, inside, d, DIM, DIM_PAD)
                v = _rows(far_v + (far + whole) * DIM, inside, d, DIM, DIM_PAD)
            seen = (whole + n < limit)[None, :]
            top, total, acc = _step(q, k, v, seen, scale, top, total, acc, True)

    # The band: masked blocks on the left, blocks that every query sees, masked ones on the right.
    band = tl.maximum(here - window + 1, first)
    left = tl.maximum((tl.minimum(here + QUERIES - window, stop) - band + KEYS_ - 1) // KEYS_, 0)
    inner = band + left * KEYS_
    plain = tl.maximum(here + 1 - inner, 0) // KEYS_
    outer = inner + plain * KEYS_
    right = tl.maximum(stop - outer + KEYS_ - 1, 0) // KEYS_
    key += kv_head * key_h + (k0 - first).to(tl.int64) * key_t
    value += kv_head * value_h + (k0 - first).to(tl.int64) * value_t
    flags += kv_head * flags_h + k0 - first
    at_k = n[:, None] * key_t + d[None, :]
    at_v = n[:, None] * value_t + d[None, :]
    for block in tl.range(0, plain, num_stages=STAGES):
        j = (inner + block * KEYS_).to(tl.int64)
        k = _rows(key + j * key_t, at_k, d, DIM, DIM_PAD)
        v = _rows(value + j * value_t, at_v, d, DIM, DIM_PAD)
        top, total, acc = _step(q, k, v, True, scale, top, total, acc, False)
    i = here + m
    for block in tl.range(0, left + right, num_stages=STAGES):
        low = tl.where(block < left, band + block * KEYS_, outer + (block - left) * KEYS_)
        j = low + n
        there = j < stop
        mask = there[:, None] & (d < DIM)[None, :]
        k = tl.load(key + low.to(tl.int64) * key_t + at_k, mask=mask, other=0.0)
        v = tl.load(value + low.to(tl.int64) * value_t + at_v, mask=mask, other=0.0)
        kept = (tl.load(flags + j, mask=there, other=0) & _ADMITTED) != 0
        near = i[:, None] - j[None, :] < window
        seen = (j[None, :] <= i[:, None]) & (near | kept[None, :]) & there[None, :]
        top, total, acc = _step(q, k, v, seen, scale, top, total, acc, True)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out += head * out_h + row * out_t
    to = out + m[:, None] * out_t + d[None, :]
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=alive)
