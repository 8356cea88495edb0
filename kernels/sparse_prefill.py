"""Attention of a prompt call: admitted tokens that left the window, and the band of recent ones.

The global tokens of a layer are gathered once into contiguous rows, head after head. A tile of
queries starting at position s then reads the rows before s - window + 1 without a mask, and the
recent keys from there on, with the exact mask where the tile needs one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops import ADMITTED, Bounds, Heads, Pages, Segments
from ._flash import find_varlen
from ._launch import check_dtype, dense_last, dot_size, on, power_of_two, shared_memory
from ._math import dot, narrow
from .prefill_gather import (
    ROWS,
    Far,
    Plan,
    Rectangles,
    Tile,
    first_row,
    gather,
    lengths,
    row_tiles,
    tile_count,
)

LOG2E = 1.4426950408889634
# After rectangles little is left, most of it the band: small blocks of keys mask less in vain.
AFTER = Tile(128, 32, 8, 3, registers=128)
_ADMITTED = tl.constexpr(ADMITTED)
_LOG2E = tl.constexpr(LOG2E)


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    pages: Pages,
    heads: Heads,
    window: int,
    scale: float,
    bounds: Bounds | None = None,
) -> Tensor:
    """Attention over {j <= i : i - j < window or admitted[j]} `[Hq, Tq, D]`.

    See `Ops.prefill_attention`. Without `bounds` it waits for the device, to learn how many rows
    the gathered tokens need. Long prompts on a Hopper device with FlashAttention-3 leave it the
    rows that whole blocks of queries see. Whether they do depends on the whole call: results with
    and without it agree within the error budget (one more rounding to the query's dtype), not bit
    for bit.
    """
    check_dtype("prefill_attention", "query", query)
    tile = tile_of(query)
    far = None
    reach = max(start + n for start, n in zip(segments.start, lengths(segments), strict=True))
    if heads.counts.numel() and reach > window:
        rectangles, group = choose_rectangles(query), query.shape[0] // key.shape[0]
        far = gather(segments, pages, heads, window, tile, group, rectangles, bounds)
    return attend(query, key, value, flags, segments, heads.counts, far, window, scale, tile)


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


def tile_of(query: Tensor) -> Tile:
    """The tile for these queries on their device."""
    return choose_tile(dot_size(query.shape[2]), query.element_size(), shared_memory(query.device))


def choose_rectangles(query: Tensor) -> Rectangles | None:
    """Rectangles for FlashAttention-3, where it is present and takes these queries."""
    attend_rectangles = find_varlen(query)
    if attend_rectangles is None:
        return None
    return Rectangles(attend_rectangles, tile=AFTER if dot_size(query.shape[2]) <= 128 else None)


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
    """Rectangles if planned, then the tile kernel on the other rows and recent keys.

    Returns `[Hq, Tq, D]`.
    """
    heads, total, dim = query.shape
    batch = len(segments.start)
    out = torch.empty(total, heads, dim, dtype=query.dtype, device=query.device)
    far_k, far_v, limits, tile, plan = far or (key, value, counts, tile, None)
    group = heads // key.shape[0]
    tile = tile.fit(segments, group)
    together, queries = tile.heads(group), tile.queries(group)
    tiles = tile_count(segments, queries)
    if not tiles:
        return out.transpose(0, 1)
    query, key, value = dense_last(query), dense_last(key), dense_last(value)
    if query.stride(0) * together >= 1 << 31:  # offsets of a tile's heads have 32 bits
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    flags, counts = dense_last(flags), counts.contiguous()
    units = batch * key.shape[0]
    taken, begun, lse = limits, out, out
    if plan is not None:
        taken = plan.taken
        begun, lse = _rectangles(query, far_k, far_v, plan, segments, scale, tile)
    # A descriptor's rows are whole units of 16 bytes. What rectangles leave is little, and read
    # in one loop with the recent keys.
    descriptors = far is not None and plan is None and tile.descriptors
    descriptors = descriptors and dim * query.element_size() % 16 == 0
    if descriptors:
        shape = [tile.keys, dot_size(dim)]
        far_k, far_v = (TensorDescriptor.from_tensor(rows, shape) for rows in (far_k, far_v))
    with on(query):
        _attend[heads // together, tiles](
            query, key, value, flags, far_k, far_v, limits, counts, taken, begun, lse, out,
            segments.cu_q_dev, segments.cu_k_dev, segments.start_dev, window, scale * LOG2E, tiles,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), flags.stride(0), out.stride(1), out.stride(0),
            BATCH=batch, BATCH_PAD=power_of_two(batch), KV_HEADS=key.shape[0], GROUP=group,
            UNITS_PAD=power_of_two(units), ROWS=ROWS, HAS_FAR=far is not None,
            BEGUN=plan is not None, DESCRIPTORS=descriptors, DIM=dim, DIM_PAD=dot_size(dim),
            TOGETHER=together, QUERIES=queries, M=tile.rows, KEYS_=tile.keys, STAGES=tile.stages,
            num_warps=tile.warps, **({"maxnreg": tile.registers} if tile.registers else {}),
        )  # fmt: skip
    return out.transpose(0, 1)


def _rectangles(
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
            query, folded, plan.taken, segments.cu_q_dev, tiles, query.stride(0), query.stride(1),
            BATCH=batch, BATCH_PAD=power_of_two(batch), GROUP=group, DIM=dim,
            DIM_PAD=power_of_two(dim), TOGETHER=together, QUERIES=tile.queries(group),
            M=tile.rows, num_warps=4,
        )  # fmt: skip
    cu_q, cu_k, used_q, used_k = plan.bounds
    return plan.attend(
        folded, k[:, None], v[:, None], cu_q, cu_k, used_q[:-1], used_k[:-1],
        plan.queries, plan.rows, scale,
    )  # fmt: skip


@triton.jit
def _fold(
    query, folded, taken, cu_q, tiles, query_h, query_t,
    BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, TOGETHER: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Copies the tiles that have a rectangle: `[Hq, T, D]` to `[Hkv * T, G, D]`."""
    head = tl.program_id(0).to(tl.int64) * TOGETHER
    tile = tl.program_id(1)
    kv_head = head // GROUP
    if tl.load(taken + kv_head * tiles + tile) == 0:
        return
    b, local = _find_tile(cu_q, tile, BATCH, BATCH_PAD, QUERIES)
    q0 = tl.load(cu_q + b)
    length = tl.load(cu_q + b + 1) - q0
    t = tl.arange(0, M) // TOGETHER
    g = tl.arange(0, M) % TOGETHER
    d = tl.arange(0, DIM_PAD)
    there = (t < QUERIES) & (local * QUERIES + t < length)
    mask = there[:, None] & (d < DIM)[None, :]
    row = (q0 + local * QUERIES + t).to(tl.int64)
    of = (head + g) * query_h + row * query_t
    to = (kv_head * tl.load(cu_q + BATCH) + row) * GROUP + head % GROUP + g
    q = tl.load(query + of[:, None] + d[None, :], mask=mask)
    tl.store(folded + (to * DIM)[:, None] + d[None, :], q, mask=mask)


@triton.jit
def _find_tile(cu_q, tile, BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, QUERIES: tl.constexpr):
    """The sequence of a tile, and the tile's number in it."""
    own = row_tiles(cu_q, BATCH, BATCH_PAD, QUERIES)
    b = tl.sum((tl.cumsum(own, 0) <= tile).to(tl.int32), 0)
    return b, tile - tl.sum(tl.where(tl.arange(0, BATCH_PAD) < b, own, 0), 0)


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
    query, key, value, flags, far_k, far_v, limits, counts, taken, begun, lse, out,
    cu_q, cu_k, start, window, scale, tiles,
    query_h, query_t, key_h, key_t, value_h, value_t, flags_h, out_h, out_t,
    BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    UNITS_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_FAR: tl.constexpr, BEGUN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, TOGETHER: tl.constexpr,
    QUERIES: tl.constexpr, M: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64) * TOGETHER  # the first of the tile's
    tile = tiles - 1 - tl.program_id(1)  # the longest tiles first
    kv_head = head // GROUP
    b, local = _find_tile(cu_q, tile, BATCH, BATCH_PAD, QUERIES)
    q0 = tl.load(cu_q + b)
    length = tl.load(cu_q + b + 1) - q0
    k0 = tl.load(cu_k + b)
    end = tl.load(start + b) + length
    first = end - (tl.load(cu_k + b + 1) - k0)  # position of the sequence's first recent key
    here = end - length + local * QUERIES  # position of the tile's first query
    stop = tl.minimum(here + QUERIES, end)

    t = tl.arange(0, M) // TOGETHER  # rows are position by position, head by head
    g = tl.arange(0, M) % TOGETHER
    n = tl.arange(0, KEYS_)
    d = tl.arange(0, DIM_PAD)
    row = (q0 + local * QUERIES).to(tl.int64)
    alive = (t < QUERIES) & (local * QUERIES + t < length)
    real = alive[:, None] & (d < DIM)[None, :]
    query += head * query_h + row * query_t
    q = tl.load(query + (g * query_h + t * query_t)[:, None] + d[None, :], mask=real, other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM_PAD], tl.float32)
    rows = here * 0  # gathered rows that are read along with recent keys
    FUSED: tl.constexpr = HAS_FAR and not DESCRIPTORS

    if HAS_FAR:
        rows = tl.load(limits + kv_head * tiles + tile)
        unit = b * KV_HEADS + kv_head.to(tl.int32)
        far = first_row(counts, unit, UNITS_PAD, ROWS)
        if BEGUN:
            # A normalised output is a weighted sum whose weights add up to 1 at the top `lse`.
            done = tl.load(taken + kv_head * tiles + tile)
            total_q = tl.load(cu_q + BATCH)
            at_m = kv_head * total_q + row + t
            started = alive & (t < tl.where(done > 0, QUERIES, 0))
            at_lse = (head % GROUP + g) * KV_HEADS * total_q + at_m
            top = tl.load(lse + at_lse, mask=started, other=float("-inf")) * _LOG2E
            total = tl.where(started, 1.0, 0.0)
            at_acc = ((at_m * GROUP + head % GROUP + g) * DIM)[:, None] + d[None, :]
            acc = tl.load(begun + at_acc, mask=started[:, None] & (d < DIM)[None, :], other=0.0)
            acc = acc.to(tl.float32)
            far += done
            rows -= done
        if FUSED:
            far_k += far * DIM
            far_v += far * DIM
        else:
            whole = rows // KEYS_ * KEYS_
            for at in tl.range(0, whole, KEYS_, num_stages=STAGES):
                k = far_k.load([(far + at).to(tl.int32), 0])
                v = far_v.load([(far + at).to(tl.int32), 0])
                top, total, acc = _step(q, k, v, True, scale, top, total, acc, False)
            if whole < rows:
                # The rows up to the next multiple of ROWS are other tokens or zeros.
                k = far_k.load([(far + whole).to(tl.int32), 0])
                v = far_v.load([(far + whole).to(tl.int32), 0])
                seen = (whole + n < rows)[None, :]
                top, total, acc = _step(q, k, v, seen, scale, top, total, acc, True)
            rows = here * 0

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
    whole = rows // KEYS_
    for block in tl.range(0, whole + plain, num_stages=STAGES):
        nth = block - whole
        j = (inner + nth * KEYS_).to(tl.int64)
        from_k, from_v, step_k, step_v = key + j * key_t, value + j * value_t, key_t, value_t
        if FUSED:
            at = (whole + nth).to(tl.int64) * KEYS_ * DIM
            from_k = tl.where(nth < 0, far_k + at, from_k)
            from_v = tl.where(nth < 0, far_v + at, from_v)
            step_k = tl.where(nth < 0, DIM, step_k)
            step_v = tl.where(nth < 0, DIM, step_v)
        k = _rows(from_k, n[:, None] * step_k + d[None, :], d, DIM, DIM_PAD)
        v = _rows(from_v, n[:, None] * step_v + d[None, :], d, DIM, DIM_PAD)
        top, total, acc = _step(q, k, v, True, scale, top, total, acc, False)
    i = here + t
    some = (rows - whole * KEYS_ > 0).to(tl.int32)  # a block of the last gathered rows
    for block in tl.range(0, some + left + right, num_stages=STAGES):
        nth = block - some
        low = tl.where(nth < left, band + nth * KEYS_, outer + (nth - left) * KEYS_)
        low = tl.where(nth < 0, stop, low)
        j = low + n
        there = j < stop
        kept = (tl.load(flags + j, mask=there, other=0) & _ADMITTED) != 0
        from_k, from_v = key + low.to(tl.int64) * key_t, value + low.to(tl.int64) * value_t
        step_k, step_v = key_t, value_t
        if FUSED:
            at = whole.to(tl.int64) * KEYS_ * DIM
            from_k = tl.where(nth < 0, far_k + at, from_k)
            from_v = tl.where(nth < 0, far_v + at, from_v)
            step_k = tl.where(nth < 0, DIM, step_k)
            step_v = tl.where(nth < 0, DIM, step_v)
            before = whole * KEYS_ + n < tl.where(nth < 0, rows, 0)
            there = there | before
            kept = kept | before
            j = tl.where(before, band, j)
        mask = there[:, None] & (d < DIM)[None, :]
        k = tl.load(from_k + n[:, None] * step_k + d[None, :], mask=mask, other=0.0)
        v = tl.load(from_v + n[:, None] * step_v + d[None, :], mask=mask, other=0.0)
        near = i[:, None] - j[None, :] < window
        seen = (j[None, :] <= i[:, None]) & (near | kept[None, :]) & there[None, :]
        top, total, acc = _step(q, k, v, seen, scale, top, total, acc, True)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out += head * out_h + row * out_t
    to = out + (g * out_h + t * out_t)[:, None] + d[None, :]
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=real)
