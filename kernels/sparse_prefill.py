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

from ..ops import ADMITTED, Bounds, Heads, Pages, Segments, check_asked
from ._chunks import cut_at_chunks
from ._flash import find_varlen
from ._launch import (
    check_dims,
    check_dtype,
    dense_last,
    dot_size,
    on,
    padded_batch,
    padded_units,
    shared_memory,
)
from ._math import narrow
from ._softmax import LOG2E, add_sink, attend_step, factors, normalised
from .prefill_gather import (
    ROWS,
    Far,
    Rectangles,
    Tile,
    find_tile,
    first_row,
    gather,
    lengths,
    run_rectangles,
    tile_count,
)

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
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Attention over {j <= i : i - j < window or admitted[j]} `[Hq, Tq, Dv]`.

    See `Ops.prefill_attention`. Without `bounds` it waits for the device, to learn how many rows
    the gathered tokens need. Long prompts on a Hopper device with FlashAttention-3 leave it the
    rows that whole blocks of queries see. Whether they do depends on the whole call: results with
    and without it agree within the error budget (one more rounding to the query's dtype), not bit
    for bit. They are not used for chunks or where values have another head_dim.
    """
    check_dtype("prefill_attention", "query", query)
    check_asked("prefill_attention", query.shape[0], softcap, sinks, chunk)
    check_dims("prefill_attention", query.shape[2], value.shape[2])
    tile = tile_of(query, value)
    far, cut = None, cut_at_chunks(segments, chunk)
    reach = max(start + n for start, n in zip(segments.start, lengths(segments), strict=True))
    if heads.counts.numel() and min(reach, chunk or reach) > window:
        alike = chunk is None and key.shape[2] == value.shape[2]
        rectangles = choose_rectangles(query, softcap) if alike else None
        group = query.shape[0] // key.shape[0]
        far = gather(cut.segments, pages, heads, window, tile, group, rectangles, bounds, cut)
    return attend(
        query, key, value, flags, cut.segments, heads.counts, far, window, scale, tile,
        softcap=softcap, sinks=sinks, owner=cut.owner,
    )  # fmt: skip


def choose_tile(dim: int, itemsize: int, shared: int) -> Tile:
    """The tile for a padded head_dim, an element size and the shared memory of a program."""
    if dim > 256:
        if itemsize == 4:
            return Tile(16, 16, 4, 1)
        return Tile(64, 32, 8, 2) if shared >= 128 << 10 else Tile(32, 16, 4, 2)
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


def tile_of(query: Tensor, value: Tensor | None = None) -> Tile:
    """The tile for these queries, and for values of another head_dim, on their device."""
    dim = max(query.shape[2], 0 if value is None else value.shape[2])
    return choose_tile(dot_size(dim), query.element_size(), shared_memory(query.device))


def choose_rectangles(query: Tensor, softcap: float | None = None) -> Rectangles | None:
    """Rectangles for FlashAttention-3, where it is present and takes these queries."""
    attend_rectangles = find_varlen(query, softcap)
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
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """Rectangles if planned, then the tile kernel on the other rows and recent keys.

    `owner` says whose stored tokens a sequence of `segments` reads, if not its own: see `Cut`.
    Returns `[Hq, Tq, Dv]`.
    """
    (heads, total, dim), dim_v = query.shape, value.shape[2]
    batch = len(segments.start)
    out = torch.empty(total, heads, dim_v, dtype=query.dtype, device=query.device)
    far_k, far_v, limits, tile, plan, before = far or (key, value, counts, tile, None, None)
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
    taken, begun, lse = limits if before is None else before, out, out
    if plan is not None:
        taken = plan.taken
        begun, lse = run_rectangles(query, far_k, far_v, plan, segments, scale, tile)
    # A descriptor's rows are whole units of 16 bytes. What rectangles leave is little, and read
    # in one loop with the recent keys.
    descriptors = far is not None and plan is None and before is None and tile.descriptors
    if descriptors and all(d * query.element_size() % 16 == 0 for d in (dim, dim_v)):
        far_k, far_v = (
            TensorDescriptor.from_tensor(rows, [tile.keys, dot_size(d)])
            for rows, d in ((far_k, dim), (far_v, dim_v))
        )
    else:
        descriptors = False
    scale, cap = factors(scale, softcap)
    with on(query):
        _attend[heads // together, tiles](
            query, key, value, flags, far_k, far_v, limits, counts, taken, begun, lse, out,
            segments.cu_q_dev, segments.cu_k_dev, segments.start_dev, window, scale, cap,
            None if sinks is None else sinks.contiguous(), owner, tiles, batch, flags.stride(0),
            query.stride(), key.stride(), value.stride(), out.stride(),
            BATCH_PAD=padded_batch(batch), KV_HEADS=key.shape[0], GROUP=group,
            UNITS_PAD=padded_units(*counts.shape), ROWS=ROWS, HAS_FAR=far is not None,
            BEGUN=plan is not None, SKIPS=before is not None, DESCRIPTORS=descriptors, DIM=dim,
            DIM_V=dim_v, DIM_PAD=dot_size(dim), DIM_V_PAD=dot_size(dim_v), TOGETHER=together,
            QUERIES=queries, M=tile.rows, KEYS_=tile.keys, STAGES=tile.stages,
            num_warps=tile.warps, **({"maxnreg": tile.registers} if tile.registers else {}),
        )  # fmt: skip
    return out.transpose(0, 1)


@triton.jit
def _resume(
    begun, lse, done, total_q, kv_head, head, row, t, g, d, alive,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """What a tile has after its rectangle of `done` rows: top, total `[M]` and acc `[M, D]`.

    A normalised output is a weighted sum whose weights add up to 1 at the top `lse`.
    """
    at_m = kv_head * total_q + row + t
    started = alive & (t < tl.where(done > 0, QUERIES, 0))
    at_lse = (head % GROUP + g) * KV_HEADS * total_q + at_m
    top = tl.load(lse + at_lse, mask=started, other=float("-inf")) * _LOG2E  # [M]
    total = tl.where(started, 1.0, 0.0)
    at_acc = ((at_m * GROUP + head % GROUP + g) * DIM)[:, None] + d[None, :]
    mask = started[:, None] & (d < DIM)[None, :]
    acc = tl.load(begun + at_acc, mask=mask, other=0.0)  # [M, D]
    return top, total, acc.to(tl.float32)


@triton.jit
def _gathered(
    q, far_k, far_v, far, rows, n, scale, cap, top, total, acc,
    KEYS_: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The rows `far` to `far + rows`, which descriptors load: top, total and acc after them."""
    whole = rows // KEYS_ * KEYS_
    for at in tl.range(0, whole, KEYS_, num_stages=STAGES):
        k = far_k.load([(far + at).to(tl.int32), 0])  # [N, D]
        v = far_v.load([(far + at).to(tl.int32), 0])  # [N, Dv]
        top, total, acc = attend_step(q, k, v, True, scale, cap, top, total, acc, False)
    if whole < rows:
        # The rows up to the next multiple of ROWS are other tokens or zeros.
        k = far_k.load([(far + whole).to(tl.int32), 0])
        v = far_v.load([(far + whole).to(tl.int32), 0])
        seen = (whole + n < rows)[None, :]
        top, total, acc = attend_step(q, k, v, seen, scale, cap, top, total, acc, True)
    return top, total, acc


@triton.jit
def _band(here, stop, first, window, QUERIES: tl.constexpr, KEYS_: tl.constexpr):
    """Recent keys of a tile: masked blocks, blocks that every query sees, masked ones again.

    Returns the first position of each part and its number of blocks.
    """
    band = tl.maximum(here - window + 1, first)
    left = tl.maximum((tl.minimum(here + QUERIES - window, stop) - band + KEYS_ - 1) // KEYS_, 0)
    inner = band + left * KEYS_
    plain = tl.maximum(here + 1 - inner, 0) // KEYS_
    outer = inner + plain * KEYS_
    right = tl.maximum(stop - outer + KEYS_ - 1, 0) // KEYS_
    return band, left, inner, plain, outer, right


@triton.jit
def _either(recent, step, far, at, is_far, DIM: tl.constexpr, FUSED: tl.constexpr):
    """Where a block starts and from row to row: at `recent`, or at row `at` if it `is_far`."""
    if FUSED:
        return tl.where(is_far, far + at * DIM, recent), tl.where(is_far, DIM, step)
    return recent, step


@triton.jit
def _rows(base, offsets, d, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Whole rows: masked only where head_dim is padded."""
    if DIM == DIM_PAD:
        return tl.load(base + offsets)
    return tl.load(base + offsets, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def _plain(
    q, key, value, key_t, value_t, far_k, far_v, whole, inner, plain, n, d, e, scale, cap,
    top, total, acc,
    DIM: tl.constexpr, DIM_V: tl.constexpr, DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr,
    KEYS_: tl.constexpr, STAGES: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Blocks that every query sees: `whole` of gathered rows, `plain` of keys from `inner` on."""
    for block in tl.range(0, whole + plain, num_stages=STAGES):
        nth = block - whole
        j = (inner + nth * KEYS_).to(tl.int64)
        at = (whole + nth).to(tl.int64) * KEYS_
        from_k, step_k = _either(key + j * key_t, key_t, far_k, at, nth < 0, DIM, FUSED)
        from_v, step_v = _either(value + j * value_t, value_t, far_v, at, nth < 0, DIM_V, FUSED)
        k = _rows(from_k, n[:, None] * step_k + d[None, :], d, DIM, DIM_PAD)  # [N, D]
        v = _rows(from_v, n[:, None] * step_v + e[None, :], e, DIM_V, DIM_V_PAD)  # [N, Dv]
        top, total, acc = attend_step(q, k, v, True, scale, cap, top, total, acc, False)
    return top, total, acc


@triton.jit
def _ragged(
    q, key, value, flags, key_t, value_t, far_k, far_v, whole, rows, band, left, outer, right,
    i, stop, window, n, d, e, scale, cap, top, total, acc,
    DIM: tl.constexpr, DIM_V: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Blocks with the exact mask: what is left of the gathered rows, then the band's two ends."""
    some = (rows - whole * KEYS_ > 0).to(tl.int32)  # a block of the last gathered rows
    for block in tl.range(0, some + left + right, num_stages=STAGES):
        nth = block - some
        low = tl.where(nth < left, band + nth * KEYS_, outer + (nth - left) * KEYS_)
        low = tl.where(nth < 0, stop, low)
        j = low + n
        there = j < stop
        kept = (tl.load(flags + j, mask=there, other=0) & _ADMITTED) != 0  # [N]
        low = low.to(tl.int64)
        at = whole.to(tl.int64) * KEYS_
        from_k, step_k = _either(key + low * key_t, key_t, far_k, at, nth < 0, DIM, FUSED)
        from_v, step_v = _either(value + low * value_t, value_t, far_v, at, nth < 0, DIM_V, FUSED)
        if FUSED:
            before = whole * KEYS_ + n < tl.where(nth < 0, rows, 0)
            there = there | before
            kept = kept | before
            j = tl.where(before, band, j)
        mask = there[:, None] & (d < DIM)[None, :]
        mask_v = there[:, None] & (e < DIM_V)[None, :]
        k = tl.load(from_k + n[:, None] * step_k + d[None, :], mask=mask, other=0.0)  # [N, D]
        v = tl.load(from_v + n[:, None] * step_v + e[None, :], mask=mask_v, other=0.0)  # [N, Dv]
        near = i[:, None] - j[None, :] < window
        seen = (j[None, :] <= i[:, None]) & (near | kept[None, :]) & there[None, :]  # [M, N]
        top, total, acc = attend_step(q, k, v, seen, scale, cap, top, total, acc, True)
    return top, total, acc


# Numbers that differ from call to call: it is compiled once for all lengths, and for batches whose
# padded size is the same.
@triton.jit(do_not_specialize=["window", "tiles", "batch", "flags_step"])
def _attend(
    query, key, value, flags, far_k, far_v, limits, counts, taken, begun, lse, out,
    cu_q, cu_k, start, window, scale, cap, sinks, owner, tiles, batch, flags_step,
    query_strides, key_strides, value_strides, out_strides,
    BATCH_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    UNITS_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_FAR: tl.constexpr, BEGUN: tl.constexpr,
    SKIPS: tl.constexpr, DESCRIPTORS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, TOGETHER: tl.constexpr, QUERIES: tl.constexpr,
    M: tl.constexpr, KEYS_: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of queries over its gathered rows, less those of its rectangle, and its band."""
    head = tl.program_id(0).to(tl.int64) * TOGETHER  # the first of the tile's
    tile = tiles - 1 - tl.program_id(1)  # the longest tiles first
    kv_head = head // GROUP
    b, local = find_tile(cu_q, tile, batch, BATCH_PAD, QUERIES)
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
    e = tl.arange(0, DIM_V_PAD)
    row = (q0 + local * QUERIES).to(tl.int64)
    alive = (t < QUERIES) & (local * QUERIES + t < length)
    query += head * query_strides[0] + row * query_strides[1]
    of = (g * query_strides[0] + t * query_strides[1])[:, None]
    q = tl.load(query + of + d[None, :], mask=alive[:, None] & (d < DIM)[None, :], other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM_V_PAD], tl.float32)
    rows = here * 0  # gathered rows that are read along with recent keys
    FUSED: tl.constexpr = HAS_FAR and not DESCRIPTORS

    if HAS_FAR:
        rows = tl.load(limits + kv_head * tiles + tile)
        owns = b if owner is None else tl.load(owner + b)
        unit = owns * KV_HEADS + kv_head.to(tl.int32)
        far = first_row(counts, unit, UNITS_PAD, ROWS)
        if BEGUN or SKIPS:
            done = tl.load(taken + kv_head * tiles + tile)
            if BEGUN:
                top, total, acc = _resume(
                    begun, lse, done, tl.load(cu_q + batch), kv_head, head, row, t, g, d, alive,
                    KV_HEADS, GROUP, DIM, QUERIES,
                )  # fmt: skip
            far += done
            rows -= done
        if FUSED:
            far_k += far * DIM
            far_v += far * DIM_V
        else:
            top, total, acc = _gathered(
                q, far_k, far_v, far, rows, n, scale, cap, top, total, acc, KEYS_, STAGES
            )
            rows = here * 0

    band, left, inner, plain, outer, right = _band(here, stop, first, window, QUERIES, KEYS_)
    key += kv_head * key_strides[0] + (k0 - first).to(tl.int64) * key_strides[1]
    value += kv_head * value_strides[0] + (k0 - first).to(tl.int64) * value_strides[1]
    flags += kv_head * flags_step + k0 - first
    whole = rows // KEYS_
    top, total, acc = _plain(
        q, key, value, key_strides[1], value_strides[1], far_k, far_v, whole, inner, plain, n, d, e,
        scale, cap, top, total, acc, DIM, DIM_V, DIM_PAD, DIM_V_PAD, KEYS_, STAGES, FUSED,
    )  # fmt: skip
    top, total, acc = _ragged(
        q, key, value, flags, key_strides[1], value_strides[1], far_k, far_v, whole, rows, band,
        left, outer, right, here + t, stop, window, n, d, e, scale, cap, top, total, acc,
        DIM, DIM_V, KEYS_, STAGES, FUSED,
    )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head + g).to(tl.float32) * _LOG2E  # [M]
        top, total, acc = add_sink(sink, top, total, acc)

    out += head * out_strides[1] + row * out_strides[0]
    to = out + (g * out_strides[1] + t * out_strides[0])[:, None] + e[None, :]
    real = alive[:, None] & (e < DIM_V)[None, :]
    tl.store(to, narrow(normalised(acc, total), out.dtype.element_ty), mask=real)
