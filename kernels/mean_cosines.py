"""How much a head's keys repeat each other, without a product of all with all others.

Keys are copied once, over their norms and without gaps: the stored ones, then the window's. The sum
of all of a key's cosines is its product with the sum of the copies; what does not count to the mean
is one cosine for each key that resembles it. Sums over keys are of integers, which add in any
order: how wide the table is changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages, Ring
from ._launch import cdiv, check_dims, check_dtype, dense_last, on, power_of_two
from ._math import narrow
from ._pages import KEYS, find, token_rows
from .redundancy import last_similar

_UNIT = tl.constexpr(1 << 40)  # sums are added in units of this part


def mean_cosines(
    pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, window: int, threshold: float
) -> Tensor:
    """Means `[B, Hkv, M * P + window]`; see `Ops.mean_cosines`."""
    check_dtype("mean_cosines", "keys", pages.k)
    size, dim = pages.k.shape[1:]
    check_dims("mean_cosines", dim)
    batch, kv_heads, columns = heads.table.shape
    units, width, device = batch * kv_heads, columns * size + window, pages.k.device
    if not units * width:
        return torch.zeros(batch, kv_heads, width, device=device)
    table, counts, recent = dense_last(heads.table), dense_last(heads.counts), dense_last(ring.k)
    copies = torch.empty(units, width, dim, dtype=pages.k.dtype, device=device)
    there = torch.empty(units, dtype=torch.int32, device=device)
    sums = torch.zeros(units, width + dim, dtype=torch.int64, device=device)
    pad = power_of_two(dim)
    block = 64 if pad <= 128 else 32 if pad <= 256 else 16
    grid = cdiv(width, block), units
    with on(pages.k):
        _copy[grid](
            pages.k, pages.slabs, table, counts, recent, lengths, copies, there, sums, width,
            window, table.stride(), counts.stride(), recent.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, SLOTS=recent.shape[2],
            DIM=dim, DIM_PAD=pad, BLOCK=block, num_warps=4,
        )  # fmt: skip
        last = last_similar(copies, there, threshold)
        every = torch.empty(units, width, dtype=torch.float32, device=device)
        _sums[grid](
            copies, there, last, sums, every, width, DIM=dim, DIM_PAD=pad, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    found = (every - sums[:, :width].double() / _UNIT.value) / there[:, None].clamp(min=1)
    return found.float().view(batch, kv_heads, width)


@triton.jit
def _copy(
    pages_k, slabs, table, counts, recent, lengths, copies, there, sums, width, window,
    table_strides, counts_strides, recent_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a head's keys over their norms, zeros after the last; adds them to the sum."""
    unit = tl.program_id(1).to(tl.int64)
    b, head = unit // KV_HEADS, unit % KV_HEADS
    count = tl.load(counts + b * counts_strides[0] + head * counts_strides[1])
    length = tl.load(lengths + b).to(tl.int32)
    near = tl.minimum(length, window)
    if tl.program_id(0) == 0:
        tl.store(there + unit, count.to(tl.int32) + near)
    n, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    to = copies + unit * width * DIM + n[:, None].to(tl.int64) * DIM + d[None, :]
    real = (d < DIM)[None, :]
    if tl.program_id(0) * BLOCK >= count + near:
        tl.store(to, tl.zeros([BLOCK, DIM_PAD], copies.dtype.element_ty),
                 mask=(n < width)[:, None] & real)  # fmt: skip
        return
    stored = n < count
    page, slot = find(table + b * table_strides[0] + head * table_strides[1], n, stored, PAGE)
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    k = tl.load(from_k, mask=stored[:, None] & real, other=0.0).to(tl.float32)  # [N, D]
    at = n - count
    late = (at >= 0) & (at < near)
    slot = (tl.where(late, length - near + at, 0) % SLOTS).to(tl.int64)
    recent += b * recent_strides[0] + head * recent_strides[1]
    from_r = recent + slot[:, None] * recent_strides[2] + d[None, :]
    k += tl.load(from_r, mask=late[:, None] & real, other=0.0).to(tl.float32)
    k = narrow(k / (tl.sqrt(tl.sum(k * k, 1)) + 1e-8)[:, None], copies.dtype.element_ty)
    tl.store(to, k, mask=(n < width)[:, None] & real)
    total = (tl.sum(k.to(tl.float32), 0).to(tl.float64) * _UNIT).to(tl.int64)
    tl.atomic_add(sums + unit * (width + DIM) + width + d, total, mask=d < DIM, sem="relaxed")


@triton.jit
def _sums(
    copies, there, last, sums, every, width,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the cosines of a block of keys, and the one of each that does not count elsewhere."""
    unit = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    held = n < tl.load(there + unit)
    copies += unit * width * DIM
    sums += unit * (width + DIM)
    mask = held[:, None] & (d < DIM)[None, :]
    from_n = copies + n[:, None].to(tl.int64) * DIM + d[None, :]
    own = tl.load(from_n, mask=mask, other=0.0).to(tl.float32)  # [N, D]
    total = tl.load(sums + width + d, mask=d < DIM, other=0).to(tl.float64) / _UNIT
    found = tl.sum(own * total.to(tl.float32)[None, :], 1) - tl.sum(own * own, 1)
    tl.store(every + unit * width + n, found, mask=n < width)
    # As the original has it: the first where none resembles.
    to = tl.maximum(tl.load(last + unit * width + n, mask=held, other=0), 0)
    from_to = copies + to[:, None].to(tl.int64) * DIM + d[None, :]
    one = tl.load(from_to, mask=mask, other=0.0).to(tl.float32)
    kept = (tl.sum(own * one, 1).to(tl.float64) * _UNIT).to(tl.int64)
    tl.atomic_add(sums + to, kept, mask=held & (to != n), sem="relaxed")
