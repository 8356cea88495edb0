"""Admitted keys of a prompt call at their true positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, POSITION_MASK, Bounds, Heads, Pages, Segments, tile_spans
from ._launch import cdiv, check_dtype, dense_last, numbers_on, on, power_of_two
from ._pages import KEYS, META, find, page_offset, token_rows

_POSITION_MASK = tl.constexpr(POSITION_MASK)
_ADMITTED = tl.constexpr(ADMITTED)
_BLOCK = 32  # tokens of a program


def keys_at(
    key: Tensor,
    flags: Tensor,
    segments: Segments,
    pages: Pages,
    heads: Heads,
    tile: int,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys `[Hkv, N, D]` by position and whether there is one `[Hkv, N]`; see `Ops.keys_at`.

    Without `bounds` it waits for the device, to learn how long the heads are.
    """
    check_dtype("keys_at", "key", key)
    kv_heads, recent, dim = key.shape
    bases, total = [], 0
    for _, stop in tile_spans(segments, tile):
        bases.append(total if stop else -1)
        total += stop * tile
    keys = torch.zeros(kv_heads, total, dim, dtype=key.dtype, device=key.device)
    present = torch.zeros(kv_heads, total, dtype=torch.bool, device=key.device)
    if not total:
        return keys, present
    most = heads.counts.tolist() if bounds is None else bounds.most
    longest = max((n for row in most for n in row), default=0)
    base = numbers_on(key.device, tuple(bases))[0, : len(bases)]
    key, flags = dense_last(key), dense_last(flags)
    table, counts = dense_last(heads.table), heads.counts.contiguous()
    rows, at, _ = segments.places()
    to = torch.where(base[rows] < 0, -1, base[rows] + at)
    pad = power_of_two(dim)
    with on(key):
        if longest:
            _stored[cdiv(longest, _BLOCK), counts.numel()](
                pages.k, pages.meta, pages.slabs, table, counts, base, keys, present, total,
                table.stride(),
                HEADS=kv_heads, SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], DIM=dim,
                DIM_PAD=pad, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
        _recent[cdiv(recent, _BLOCK), kv_heads](
            key, flags, to, keys, present, recent, total, key.stride(), flags.stride(),
            DIM=dim, DIM_PAD=pad, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return keys, present


@triton.jit
def _stored(
    pages_k, pages_meta, slabs, table, counts, base, keys, present, total, table_strides,
    HEADS: tl.constexpr, SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies a block of a head's global tokens to their positions."""
    unit = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + unit)
    b = (unit // HEADS).to(tl.int64)
    h = (unit % HEADS).to(tl.int64)
    start = tl.load(base + b)
    if (tl.program_id(0) * BLOCK >= count) | (start < 0):
        return
    d = tl.arange(0, DIM_PAD)
    there = n < count
    page, slot = find(table + b * table_strides[0] + h * table_strides[1], n, there, PAGE)
    mask = there[:, None] & (d < DIM)[None, :]
    from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
    at = tl.load(pages_meta + from_meta, mask=there, other=0) & _POSITION_MASK  # [N]
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    to = h * total + start + at
    k = tl.load(from_k, mask=mask, other=0.0)  # [N, D]
    tl.store(keys + to[:, None] * DIM + d[None, :], k, mask=mask)
    tl.store(present + to, there, mask=there)


@triton.jit
def _recent(
    key, flags, to, keys, present, recent, total, key_strides, flags_strides,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies a block of a head's recent tokens, those that were admitted, to their positions."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PAD)
    at = tl.load(to + t, mask=t < recent, other=-1)  # [N]
    flag = tl.load(flags + h * flags_strides[0] + t, mask=t < recent, other=0)
    there = (at >= 0) & ((flag & _ADMITTED) != 0)
    mask = there[:, None] & (d < DIM)[None, :]
    from_k = key + h * key_strides[0] + t.to(tl.int64)[:, None] * key_strides[1] + d[None, :]
    k = tl.load(from_k, mask=mask, other=0.0)  # [N, D]
    tl.store(keys + (h * total + at)[:, None] * DIM + d[None, :], k, mask=mask)
    tl.store(present + h * total + at, there, mask=there)
