"""How far keys or values lie outside the range of the partition after theirs, from pages.

A program owns a partition: it reads the next one for the range of every channel, then its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages, Ring, whole_lags
from ._launch import check_dims, check_dtype, dense_last, on, power_of_two
from ._pages import KEYS, VALUES, find, token_rows


def lag_spreads(
    pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, window: int, *, sinks: int, lag: int,
    values: bool = False,
) -> Tensor:  # fmt: skip
    """Spreads `[B, Hkv, parts, lag]`; see `Ops.lag_spreads`."""
    store, near = (pages.v, ring.v) if values else (pages.k, ring.k)
    check_dtype("lag_spreads", "values" if values else "keys", store)
    size, dim = store.shape[1:]
    check_dims("lag_spreads", dim)
    batch, kv_heads, columns = heads.table.shape
    parts, pad = whole_lags(columns * size + window - sinks, lag), power_of_two(dim)
    out = torch.empty(batch, kv_heads, parts, lag, dtype=torch.float32, device=store.device)
    if out.numel():
        table, counts = dense_last(heads.table), dense_last(heads.counts)
        near = dense_last(near)
        with on(store):
            _lag_spreads[parts, batch * kv_heads](
                store, pages.slabs, table, counts, near, lengths, out, window, sinks, lag, parts,
                table.stride(), counts.stride(), near.stride(),
                COLUMN=(VALUES if values else KEYS).value, SLAB_PAGES=pages.slab_pages, PAGE=size,
                KV_HEADS=kv_heads, SLOTS=near.shape[2], DIM=dim, DIM_PAD=pad,
                TOKENS=32 if pad <= 256 else 16, num_warps=4,
            )  # fmt: skip
    return out


@triton.jit
def _tokens(
    store, slabs, table, near, n, there, count, first, near_strides,
    COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Tokens n of a head, `[N, D]` float32: stored ones, then the window's from `first` on."""
    d = tl.arange(0, DIM_PAD)
    far = there & (n < count)
    page, slot = find(table, n, far, PAGE)
    source = token_rows(store, slabs, page, slot, d, COLUMN, SLAB_PAGES, PAGE, DIM)
    x = tl.load(source, mask=far[:, None] & (d < DIM)[None, :], other=0.0)
    recent = there & (n >= count)
    at = (tl.where(recent, first + n - count, 0) % SLOTS).to(tl.int64)
    source = near + at[:, None] * near_strides[2] + d[None, :]
    y = tl.load(source, mask=recent[:, None] & (d < DIM)[None, :], other=0.0)
    return tl.where(recent[:, None], y, x).to(tl.float32)


@triton.jit
def _lag_spreads(
    store, slabs, table, counts, near, lengths, out, window, sinks, lag, parts,
    table_strides, counts_strides, near_strides,
    COLUMN: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Standard deviations over the channels of one partition's tokens, scaled by the next one."""
    part, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    n, d = tl.arange(0, TOKENS), tl.arange(0, DIM_PAD)
    out += (unit * parts + part) * lag
    count = tl.load(counts + b * counts_strides[0] + head)
    length = tl.load(lengths + b).to(tl.int32)
    recent = tl.minimum(length, window)
    begin = sinks + part * lag
    if begin + 2 * lag > count + recent:
        for start in range(0, lag, TOKENS):
            tl.store(out + start + n, tl.zeros([TOKENS], tl.float32), mask=start + n < lag)
        return
    table += b * table_strides[0] + head * table_strides[1]
    near += b * near_strides[0] + head * near_strides[1]
    low = tl.full([DIM_PAD], float("inf"), tl.float32)
    high = tl.full([DIM_PAD], float("-inf"), tl.float32)
    for start in tl.range(0, lag, TOKENS, num_stages=3):
        there = start + n < lag
        x = _tokens(
            store, slabs, table, near, begin + lag + start + n, there, count, length - recent,
            near_strides, COLUMN, SLAB_PAGES, PAGE, SLOTS, DIM, DIM_PAD,
        )  # fmt: skip
        low = tl.minimum(low, tl.min(tl.where(there[:, None], x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(there[:, None], x, float("-inf")), 0))
    apart = tl.where(high == low, 1.0, high - low)  # a channel that is one number
    for start in tl.range(0, lag, TOKENS, num_stages=3):
        there = start + n < lag
        x = _tokens(
            store, slabs, table, near, begin + start + n, there, count, length - recent,
            near_strides, COLUMN, SLAB_PAGES, PAGE, SLOTS, DIM, DIM_PAD,
        )  # fmt: skip
        x = tl.where((d < DIM)[None, :], (x - low[None, :]) / apart[None, :], 0.0)
        away = x - (tl.sum(x, 1) / DIM)[:, None]
        away = tl.where((d < DIM)[None, :], away, 0.0)
        spread = tl.sqrt(tl.sum(away * away, 1) / (DIM - 1))
        tl.store(out + start + n, spread, mask=there)
