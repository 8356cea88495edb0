"""Attention of a prompt call over the window, and the blocks and columns that tiles chose.

The global tokens of a layer are gathered into contiguous rows, head after head. A block of keys is
a range of them; what a tile of queries reads without a mask is listed for it beforehand, as whole
steps of keys and as what blocks leave over. Rows that only some queries of the tile have out of
their window follow with a mask, then columns, then the window itself from the recent keys.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops import Bounds, Heads, Pages, Segments, TileReads, check_asked, tile_spans
from ._launch import (
    capability,
    cdiv,
    check_dims,
    check_dtype,
    dense_last,
    dot_size,
    on,
    shared_memory,
)
from ._math import narrow
from ._softmax import LOG2E, add_sink, attend_step, factors, normalised
from .prefill_gather import ROWS, gather_rows
from .tile_lists import columns_of, edges_of, list_rows, tile_of

_SCRATCH = 256 << 20  # bytes of lists at a time
_MOST_TILES = 65535
_LOG2E = tl.constexpr(LOG2E)


class Tile(NamedTuple):
    """Queries and keys of a step, keys of a step with a mask, warps, stages.

    With `descriptors` the device's copy engine loads whole steps. `registers` is the most that a
    thread gets.
    """

    queries: int
    keys: int
    rest: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None


def choose_tile(tile: int, dim: int, itemsize: int, shared: int) -> Tile:
    """For a tile of positions, a padded head_dim, an element size and a program's shared memory."""
    if itemsize == 4:
        found = Tile(64, 32, 32, 8, 2) if dim <= 128 else Tile(16, 16, 16, 4, 1)
    elif dim > 256:
        found = Tile(64, 32, 32, 8, 2) if shared >= 128 << 10 else Tile(32, 16, 16, 4, 2)
    elif dim > 128:
        big = shared >= 128 << 10
        found = Tile(128, 64, 32, 8, 2, shared >= 200 << 10) if big else Tile(64, 32, 32, 8, 2)
    elif shared >= 200 << 10:
        found = Tile(128, 128, 64, 8, 3, True)
    else:
        found = Tile(128, 64, 64, 8, 3 if shared >= 128 << 10 else 2)
    queries = min(found.queries, tile)
    keys = max(min(found.keys, tile), 16)
    small = queries <= 64 and found.warps == 8 and itemsize == 2
    return found._replace(
        queries=queries, keys=keys, rest=min(found.rest, keys), warps=4 if small else found.warps
    )


@lru_cache
def _gluon() -> ModuleType | None:
    """The kernel for capability 9.0, where this Triton has what it is written in."""
    try:
        from . import selected_gluon
    except (ImportError, AttributeError):
        return None
    return selected_gluon


def selected_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    pages: Pages,
    heads: Heads,
    window: int,
    scale: float,
    reads: TileReads,
    bounds: Bounds | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention `[Hq, Tq, Dv]` over windows and what `reads` names; see `Ops.selected_prefill`.

    Without `bounds` it waits for the device, to learn how many rows the gathered tokens need.
    """
    check_dtype("selected_prefill", "query", query)
    check_asked("selected_prefill", query.shape[0], softcap, sinks)
    (query_heads, total, dim), dim_v = query.shape, value.shape[2]
    check_dims("selected_prefill", dim, dim_v)
    out = torch.empty(total, query_heads, dim_v, dtype=query.dtype, device=query.device)
    spans = tile_spans(segments, reads.tile)
    if not total:
        return out.transpose(0, 1)
    shared, padded = shared_memory(query.device), dot_size(max(dim, dim_v))
    gluon = _gluon() if capability(query.device) == 90 else None
    if gluon is not None and gluon.fits(query, value, segments, reads, softcap):
        shape = Tile(gluon.KEYS, gluon.KEYS, gluon.KEYS, 4, 2)
    else:
        gluon, shape = None, choose_tile(reads.tile, padded, query.element_size(), shared)
    table, counts = dense_last(heads.table), heads.counts.contiguous()
    most = counts.tolist() if bounds is None else bounds.most
    longest = max((n for row in most for n in row), default=0)
    rows = max(sum(cdiv(n, ROWS) for row in most for n in row), 1) * ROWS
    far_k, far_v, at = gather_rows(pages, Heads(table, counts), rows, longest)
    blocks = reads.blocks.contiguous()
    owner = [b for b, (low, high) in enumerate(spans) for _ in range(low, high)]
    number = [n for low, high in spans for n in range(low, high)]
    of = torch.tensor([owner, number], dtype=torch.int32).to(query.device, non_blocking=True)
    width, parts = blocks.shape[2], reads.tile // shape.queries
    steps = max(longest, 1).bit_length()
    edges = edges_of(at, counts, width, reads.tile, steps)
    columns = columns_of(reads, of, at, counts, key.shape[0], steps)
    # Rows that a tile reads are in whole steps, and less than one of each block in parts.
    whole = cdiv(longest, shape.keys) or 1
    rest = width * cdiv(min(reads.tile, shape.keys - 1), shape.rest) if longest else 1
    each = blocks.shape[0] * parts * (4 * whole + 8 * rest + 16)
    size = max(min(_SCRATCH // each, _MOST_TILES // parts), 1)
    call = _Call(
        dense_last(query), dense_last(key), dense_last(value), far_k, far_v, at, counts, blocks,
        edges, columns, of, segments, reads.tile, window, scale, softcap,
        None if sinks is None else sinks.contiguous(), out, shape, steps, gluon,
    )  # fmt: skip
    for end in range(len(owner), 0, -size):  # the longest tiles first
        _span(call, (whole, rest), max(end - size, 0), end)
    return out.transpose(0, 1)


class _Call(NamedTuple):
    """What all spans of tiles share."""

    query: Tensor
    key: Tensor
    value: Tensor
    far_k: Tensor
    far_v: Tensor
    at: Tensor
    counts: Tensor
    blocks: Tensor
    edges: Tensor
    columns: tuple[Tensor, Tensor, Tensor] | None
    of: Tensor
    segments: Segments
    tile: int
    window: int
    scale: float
    softcap: float | None
    sinks: Tensor | None
    out: Tensor
    shape: Tile
    steps: int
    gluon: ModuleType | None


def _span(call: _Call, sizes: tuple[int, int], begin: int, end: int) -> None:
    """Attention of the tiles from `begin` to `end`; `sizes` bound their lists."""
    query, key, value, out, shape, blocks = (
        call.query, call.key, call.value, call.out, call.shape, call.blocks,
    )  # fmt: skip
    kv_heads, choosing, width = key.shape[0], blocks.shape[0], blocks.shape[2]
    many, segments = (end - begin) * (call.tile // shape.queries), call.segments
    lists = list_rows(
        sizes, begin, many, blocks, call.edges, call.at, call.counts, segments, call.of,
        call.window, call.steps, kv_heads, call.tile, (shape.queries, shape.keys, shape.rest),
    )  # fmt: skip
    if call.gluon is not None:
        call.gluon.attend(
            query, key, value, call.far_k, call.far_v, call.at, blocks, lists, segments, call.of,
            call.tile, call.window, call.scale, call.sinks, out, begin, many,
        )  # fmt: skip
        return
    bounds = segments.cu_q_dev, segments.cu_k_dev, segments.start_dev
    (heads, _, dim), dim_v = query.shape, value.shape[2]
    far_k: Any = call.far_k
    far_v: Any = call.far_v
    descriptors = shape.descriptors and shape.keys % 8 == 0
    if descriptors and all(d * query.element_size() % 16 == 0 for d in (dim, dim_v)):
        far_k, far_v = (
            TensorDescriptor.from_tensor(rows, [shape.keys, dot_size(d)])
            for rows, d in ((far_k, dim), (far_v, dim_v))
        )
    else:
        descriptors = False
    where, found, sets = call.columns or (None, None, None)
    scale, cap = factors(call.scale, call.softcap)
    with on(query):
        # Heads of a group side by side, one KV head after another, whose rows stay in the L2.
        _attend_chosen[heads // kv_heads, many, kv_heads](
            query, key, value, far_k, far_v, call.far_k, call.far_v, call.at, blocks, *lists,
            where, found, sets, *bounds, call.of, out, begin, call.window, width,
            call.of.shape[1], *sizes, scale, cap, call.sinks,
            0 if where is None else where.shape[2], 1 if where is None else where.shape[1],
            query.stride(), key.stride(), value.stride(), out.stride(),
            GROUP=heads // kv_heads, SHARED=heads // choosing, TILE=call.tile,
            QUERIES=shape.queries, M=max(shape.queries, 16), KEYS_=shape.keys,
            REST=max(shape.rest, 16), DIM=dim, DIM_V=dim_v, DIM_PAD=dot_size(dim),
            DIM_V_PAD=dot_size(dim_v), DESCRIPTORS=descriptors, STAGES=shape.stages,
            num_warps=shape.warps, **({"maxnreg": shape.registers} if shape.registers else {}),
        )  # fmt: skip


@triton.jit
def _load_rows(base, row, d, there, DIM: tl.constexpr):
    """Channels d of rows `[N, D]`, zeros where none is there."""
    mask = there[:, None] & (d < DIM)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * DIM + d[None, :], mask=mask, other=0.0)


@triton.jit
def _plain(
    q, far_k, far_v, rows_k, rows_v, whole, rest, wholes, rests, d, e, scale, cap, top, total, acc,
    KEYS_: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the lists name, without a mask: top, total and acc after it."""
    n = tl.arange(0, KEYS_)
    for step in tl.range(0, wholes, num_stages=2 * STAGES - 1):
        row = tl.load(whole + step)
        if DESCRIPTORS:
            k = far_k.load([row, 0])  # [N, D]
            v = far_v.load([row, 0])  # [N, Dv]
        else:
            k = _load_rows(rows_k, row + n, d, n >= 0, DIM)
            v = _load_rows(rows_v, row + n, e, n >= 0, DIM_V)
        top, total, acc = attend_step(q, k, v, True, scale, cap, top, total, acc, False)
    n = tl.arange(0, REST)
    for step in tl.range(0, rests, num_stages=STAGES):
        code = tl.load(rest + step)
        there = n < (code % 256).to(tl.int32)
        row = code // 256 + n
        k = _load_rows(rows_k, row, d, there, DIM)
        v = _load_rows(rows_v, row, e, there, DIM_V)
        top, total, acc = attend_step(q, k, v, there[None, :], scale, cap, top, total, acc, True)
    return top, total, acc


@triton.jit
def _masked(
    q, rows_k, rows_v, at, blocks, where, found, plain, some, columns, last, i, window, d, e,
    scale, cap, top, total, acc,
    TILE: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Rows that some queries have out of their window, and columns; `last` is the last query's
    first position in its window."""
    n = tl.arange(0, REST)
    for low in tl.range(plain, some, REST, num_stages=1):
        row = low + n
        there = row < some
        place = tl.load(at + row, mask=there, other=0)  # [N]
        there &= tl.load(blocks + place // TILE, mask=there, other=0) != 0
        if tl.max(there.to(tl.int32), 0) > 0:
            seen = there[None, :] & (place[None, :] <= i[:, None] - window)
            k = _load_rows(rows_k, row, d, there, DIM)
            v = _load_rows(rows_v, row, e, there, DIM_V)
            top, total, acc = attend_step(q, k, v, seen, scale, cap, top, total, acc, True)
    if where is not None:
        for low in tl.range(0, columns, REST, num_stages=1):
            place = tl.load(where + low + n, mask=low + n < columns, other=1 << 30)
            near = place < last
            row = tl.load(found + low + n, mask=near, other=-1)
            chosen = tl.load(blocks + place // TILE, mask=near, other=1) != 0
            there = (row >= 0) & (chosen == 0)
            if tl.max(there.to(tl.int32), 0) > 0:
                seen = there[None, :] & (place[None, :] <= i[:, None] - window)
                k = _load_rows(rows_k, row, d, there, DIM)
                v = _load_rows(rows_v, row, e, there, DIM_V)
                top, total, acc = attend_step(q, k, v, seen, scale, cap, top, total, acc, True)
    return top, total, acc


@triton.jit
def _near(
    q, key, value, key_t, value_t, low, high, stop, i, window, d, e, scale, cap, top, total, acc,
    KEYS_: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Recent keys from position `low` to `high`, in the window where MASKED asks."""
    n = tl.arange(0, KEYS_)
    for first in tl.range(low, high, KEYS_, num_stages=STAGES):
        j = first + n
        there = j < (stop if MASKED else high)
        mask = there[:, None] & (d < DIM)[None, :]
        mask_v = there[:, None] & (e < DIM_V)[None, :]
        of = j.to(tl.int64)[:, None]
        k = tl.load(key + of * key_t + d[None, :], mask=mask, other=0.0)  # [N, D]
        v = tl.load(value + of * value_t + e[None, :], mask=mask_v, other=0.0)  # [N, Dv]
        seen = (j[None, :] <= i[:, None]) & (i[:, None] - j[None, :] < window) & there[None, :]
        top, total, acc = attend_step(q, k, v, seen, scale, cap, top, total, acc, MASKED)
    return top, total, acc


@triton.jit(do_not_specialize=["begin", "width", "many", "most_whole", "most_rest", "each"])
def _attend_chosen(
    query, key, value, far_k, far_v, rows_k, rows_v, at, blocks, whole, rest, listed,
    where, found, sets, cu_q, cu_k, start, of, out, begin, window, width, many, most_whole,
    most_rest, scale, cap, sinks, columns, each,
    query_strides, key_strides, value_strides, out_strides,
    GROUP: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
    M: tl.constexpr,
    KEYS_: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A part of a tile of one head: what it chose of the rows, then its window."""
    head = (tl.program_id(2) * GROUP + tl.program_id(0)).to(tl.int64)
    nth = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = head // GROUP
    chooser = head // SHARED
    b, tile, number, first, here, stop = tile_of(of, cu_q, start, nth, many, begin, TILE, QUERIES)
    q0 = tl.load(cu_q + b)
    end = tl.load(start + b) + tl.load(cu_q + b + 1) - q0
    low = end - (tl.load(cu_k + b + 1) - tl.load(cu_k + b))  # of the first recent key
    t = tl.arange(0, M)
    i = first + t
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    alive = (t < QUERIES) & (i >= here) & (i < stop)
    row = (q0 - tl.load(start + b) + i).to(tl.int64)
    of_q = query + head * query_strides[0] + row[:, None] * query_strides[1] + d[None, :]
    q = tl.load(of_q, mask=alive[:, None] & (d < DIM)[None, :], other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM_V_PAD], tl.float32)
    slot = chooser * tl.num_programs(1) + nth
    listed += slot * 5
    blocks += (chooser * many + tile) * width
    if where is not None:
        own = (chooser * each + tl.load(sets + tile)) * columns
        where += own
        found += own
    top, total, acc = _plain(
        q, far_k, far_v, rows_k, rows_v, whole + slot * most_whole, rest + slot * most_rest,
        tl.load(listed), tl.load(listed + 1), d, e, scale, cap, top, total, acc,
        KEYS_, REST, DIM, DIM_V, DESCRIPTORS, STAGES,
    )  # fmt: skip
    top, total, acc = _masked(
        q, rows_k, rows_v, at, blocks, where, found, tl.load(listed + 2), tl.load(listed + 3),
        columns, stop - window, i, window, d, e, scale, cap, top, total, acc,
        TILE, REST, DIM, DIM_V,
    )  # fmt: skip
    # Recent keys that some queries do not see, that all see, and those up to the last query.
    band = tl.maximum(here - window + 1, low)
    inner = band + tl.maximum(stop - window - band + KEYS_ - 1, 0) // KEYS_ * KEYS_
    outer = inner + tl.maximum(here + 1 - inner, 0) // KEYS_ * KEYS_
    shift = tl.load(cu_k + b) - low
    key += kv_head * key_strides[0] + shift.to(tl.int64) * key_strides[1]
    value += kv_head * value_strides[0] + shift.to(tl.int64) * value_strides[1]
    for part in tl.static_range(0, 3):
        from_ = band if part == 0 else (inner if part == 1 else outer)
        upto = tl.minimum(inner, stop) if part == 0 else (outer if part == 1 else stop)
        top, total, acc = _near(
            q, key, value, key_strides[1], value_strides[1], from_, upto, stop, i, window, d, e,
            scale, cap, top, total, acc, KEYS_, DIM, DIM_V, part != 1, STAGES,
        )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        top, total, acc = add_sink(tl.full([M], 0.0, tl.float32) + sink, top, total, acc)
    to = out + head * out_strides[1] + row[:, None] * out_strides[0] + e[None, :]
    real = alive[:, None] & (e < DIM_V)[None, :]
    tl.store(to, narrow(normalised(acc, total), out.dtype.element_ty), mask=real)
