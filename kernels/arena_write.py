"""Writing decoded tokens where sequences have arenas of pages: all in one launch.

One program takes all heads of a sequence, so that they are given pages in their order, with neither
a stack nor an atomic, and a replay gives the same pages again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, Arenas, Heads, Pages, Ring
from ._launch import check_dense, dense_last, on, power_of_two
from ._math import narrow
from ._pages import KEYS, META, SUMMARY, VALUES, page_offset, token_rows

_ADMITTED = tl.constexpr(ADMITTED)
_WARP = 2048  # elements of keys or values that a warp should hold at most


def arena_write(
    pages: Pages,
    heads: Heads,
    ring: Ring,
    arenas: Arenas,
    key: Tensor,
    value: Tensor,
    flags: Tensor | None,
    rows: Tensor,
    lengths: Tensor,
    active: Tensor,
    window: int,
    *,
    minmax: bool = False,
    bits: int = 0,
) -> None:
    """Writes one decoded token of each of some sequences; see `Ops.arena_write`."""
    (table, counts), (ring_k, ring_v, ring_flags) = heads, ring
    (_, kv_heads, slots, dim), dim_v = ring_k.shape, ring_v.shape[3]
    check_dense(
        "arena_write",
        table=table,
        counts=counts,
        ring_k=ring_k,
        ring_v=ring_v,
        ring_flags=ring_flags,
        blocks=arenas.blocks,
    )
    summary = pages.summary
    if minmax and (summary is None or summary.shape[1] != 2 * dim):
        raise ValueError(f"arena_write: minmax wants summaries [n, {2 * dim}] in pages.summary")
    key, value = dense_last(key), dense_last(value)
    width = power_of_two(kv_heads) * power_of_two(max(dim, dim_v))
    with on(ring_k):
        _arena_write[rows.shape[0],](
            pages.k, pages.v, pages.meta, summary if minmax else None, pages.slabs, table, counts,
            ring_k, ring_v, ring_flags, key, value, flags, rows, lengths, active, arenas.blocks,
            arenas.room, arenas.taken, arenas.refused, arenas.spare, arenas.spared, window,
            arenas.pages_per_block, arenas.blocks.stride(0),
            0 if arenas.spare is None else arenas.spare.stride(0), table.stride(), counts.stride(),
            ring_k.stride(), ring_v.stride(), ring_flags.stride(), key.stride(), value.stride(),
            (0, 0) if flags is None else flags.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], SLOTS=slots, HEADS=kv_heads,
            HEADS_PAD=power_of_two(kv_heads), DIM=dim, DIM_V=dim_v, DIM_PAD=power_of_two(dim),
            DIM_V_PAD=power_of_two(dim_v), BITS=bits, num_warps=min(max(width // _WARP, 4), 8),
        )  # fmt: skip


@triton.jit
def _arena_write(
    pages_k, pages_v, pages_meta, summary, slabs, table, counts, ring_k, ring_v, ring_flags,
    key, value, flags, rows, lengths, active, blocks, room, taken, refused, spare, spared, window,
    each, blocks_stride, spare_stride, table_strides, counts_strides, ring_k_strides,
    ring_v_strides, ring_flags_strides, key_strides, value_strides, flags_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, DIM_PAD: tl.constexpr,
    DIM_V_PAD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """All KV heads of a sequence: promotes the token that leaves, then writes the new one."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.load(rows + n).to(tl.int64)
    if tl.load(active + b) == 0:
        return
    h = tl.arange(0, HEADS_PAD)
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    here = h < HEADS
    real = here[:, None] & (d < DIM)[None, :]
    real_v = here[:, None] & (e < DIM_V)[None, :]
    ring_k += b * ring_k_strides[0] + h[:, None] * ring_k_strides[1] + d[None, :]
    ring_v += b * ring_v_strides[0] + h[:, None] * ring_v_strides[1] + e[None, :]
    ring_flags += b * ring_flags_strides[0] + h * ring_flags_strides[1]
    from_k = key + n * key_strides[0] + h[:, None] * key_strides[1] + d[None, :]
    new_k = tl.load(from_k, mask=real, other=0.0)  # [H, D]
    from_v = value + n * value_strides[0] + h[:, None] * value_strides[1] + e[None, :]
    new_v = tl.load(from_v, mask=real_v, other=0.0)  # [H, Dv]
    new_flags = tl.full([HEADS_PAD], BITS, tl.uint8)
    if flags is not None:
        new_flags |= tl.load(
            flags + n * flags_strides[0] + h * flags_strides[1], mask=here, other=0
        )
    length = tl.load(lengths + b).to(tl.int32)
    leaving = length - window
    out = tl.maximum(leaving, 0) % SLOTS
    leave = h < tl.where(leaving >= 0, HEADS, 0)
    gone = tl.load(ring_flags + out, mask=leave, other=0)
    if spare is not None:
        spare += b * spare_stride
        spared += b
    held = counts + b * counts_strides[0] + h
    count = tl.load(held, mask=here, other=0)
    stored, page = _place(
        table + b * table_strides[0] + h * table_strides[1], count, (gone & _ADMITTED) != 0,
        blocks + b * blocks_stride, room + b, taken + b, refused + b, spare, spared, each, PAGE,
    )  # fmt: skip
    slot = count % PAGE
    kept = real & stored[:, None]
    k = tl.load(ring_k + out.to(tl.int64) * ring_k_strides[2], mask=kept, other=0.0)  # [H, D]
    kept_v = real_v & stored[:, None]
    v = tl.load(ring_v + out.to(tl.int64) * ring_v_strides[2], mask=kept_v, other=0.0)  # [H, Dv]
    to_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    tl.store(to_k, k, mask=kept)
    to_v = token_rows(pages_v, slabs, page, slot, e, VALUES, SLAB_PAGES, PAGE, DIM_V)
    tl.store(to_v, v, mask=kept_v)
    to_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
    tl.store(pages_meta + to_meta, leaving + h * 0, mask=stored)
    if summary is not None:
        extent = page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM)[:, None] + d[None, :]
        _extend(summary + extent, k.to(tl.float32), slot, kept, DIM)
    # Everyone has read the counts, and with as many slots as the window is wide the new token takes
    # the place of the leaving one.
    tl.debug_barrier()
    tl.store(held, count + 1, mask=stored)
    into = length % SLOTS
    tl.store(ring_k + into.to(tl.int64) * ring_k_strides[2], new_k, mask=real)
    tl.store(ring_v + into.to(tl.int64) * ring_v_strides[2], new_v, mask=real_v)
    tl.store(ring_flags + into, new_flags, mask=here)


@triton.jit
def _place(
    table, count, wanted, blocks, room, taken, refused, spare, spared, each, PAGE: tl.constexpr
):
    """Whether the heads' leaving tokens are stored, and in which pages `[H]`; takes these."""
    entry = table + count // PAGE
    fresh = (wanted & (count % PAGE == 0)).to(tl.int32)
    first = tl.load(taken)
    number = first + tl.cumsum(fresh, 0) - fresh
    granted = (fresh != 0) & (number < tl.load(room))
    stored = wanted & ((fresh == 0) | granted)
    block = tl.load(blocks + number // each, mask=granted, other=0)
    page = tl.load(entry, mask=stored & (fresh == 0), other=0)
    new = block * each + number % each
    if spare is not None:
        given = granted & (number < tl.load(spared))
        new = tl.where(given, tl.load(spare + number, mask=given, other=0), new)
    page = tl.where(granted, new, page)
    tl.store(entry, page, mask=granted)
    lost = tl.sum((wanted & (stored == 0)).to(tl.int64), 0)
    known = tl.load(refused)
    tl.debug_barrier()
    tl.store(taken, first + tl.sum(granted.to(tl.int32), 0))
    tl.store(refused, known + lost)
    return stored, page


@triton.jit
def _extend(extent, key, slot, stored, DIM: tl.constexpr):
    """Extends pages' minima and maxima `[H, D]`, at `extent` and DIM further on, by keys."""
    old = stored & (slot > 0)[:, None]
    low = tl.load(extent, mask=old, other=float("inf")).to(tl.float32)
    high = tl.load(extent + DIM, mask=old, other=float("-inf")).to(tl.float32)
    tl.store(extent, narrow(tl.minimum(low, key), extent.dtype.element_ty), mask=stored)
    tl.store(extent + DIM, narrow(tl.maximum(high, key), extent.dtype.element_ty), mask=stored)
