"""Writing tokens: into pages after a prompt call, into ring and pages for a decoded token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, MARKED, POSITION_BITS, Heads, Pages, Ring, check_minmax
from ._launch import cdiv, check_dense, dense_last, on, power_of_two
from ._math import narrow
from ._pages import KEYS, META, SUMMARY, VALUES, find, page_offset, token_rows

_ADMITTED = tl.constexpr(ADMITTED)
_MARKED = tl.constexpr(MARKED)
_POSITION_BITS = tl.constexpr(POSITION_BITS)
_APPEND_TOKENS = 32


def append(
    pages: Pages,
    table: Tensor,
    key: Tensor,
    value: Tensor,
    meta: Tensor,
    dest: Tensor,
    rows: Tensor,
) -> None:
    """Stores tokens in pages that the table already names; see `Ops.append`."""
    (heads, tokens, dim), dim_v = key.shape, value.shape[2]
    if tokens == 0:
        return
    key, value = dense_last(key), dense_last(value)
    table, meta, dest = dense_last(table), dense_last(meta), dense_last(dest)
    with on(pages.k):
        _append[cdiv(tokens, _APPEND_TOKENS), heads](
            pages.k, pages.v, pages.meta, pages.slabs, table, key, value, meta, dest, rows, tokens,
            table.stride(), key.stride(), value.stride(), meta.stride(), dest.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], DIM=dim, DIM_V=dim_v,
            DIM_PAD=power_of_two(dim), DIM_V_PAD=power_of_two(dim_v), TOKENS=_APPEND_TOKENS,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _append(
    pages_k, pages_v, pages_meta, slabs, table, key, value, meta, dest, rows, tokens,
    table_strides, key_strides, value_strides, meta_strides, dest_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Stores a block of tokens of one head."""
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    index = tl.load(dest + head * dest_strides[0] + t, mask=t < tokens, other=-1)  # [T]
    stored = index >= 0
    row = tl.load(rows + t, mask=stored, other=0).to(tl.int64)  # [T]
    own = table + row * table_strides[0] + head * table_strides[1]
    page, slot = find(own, index, stored, PAGE)
    mask = stored[:, None] & (d < DIM)[None, :]
    mask_v = stored[:, None] & (e < DIM_V)[None, :]
    from_k = key + head * key_strides[0] + t[:, None] * key_strides[1] + d[None, :]
    k = tl.load(from_k, mask=mask, other=0.0)  # [T, D]
    to_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    tl.store(to_k, k, mask=mask)
    from_v = value + head * value_strides[0] + t[:, None] * value_strides[1] + e[None, :]
    v = tl.load(from_v, mask=mask_v, other=0.0)  # [T, Dv]
    to_v = token_rows(pages_v, slabs, page, slot, e, VALUES, SLAB_PAGES, PAGE, DIM_V)
    tl.store(to_v, v, mask=mask_v)
    about = tl.load(meta + head * meta_strides[0] + t, mask=stored, other=0)  # [T]
    to_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
    tl.store(pages_meta + to_meta, about, mask=stored)


def decode_write(
    pages: Pages,
    heads: Heads,
    ring: Ring,
    key: Tensor,
    value: Tensor,
    flags: Tensor | None,
    lengths: Tensor,
    active: Tensor,
    window: int,
    *,
    minmax: bool = False,
    bits: int = 0,
    query: Tensor | None = None,
    queries: Tensor | None = None,
) -> None:
    """Writes one decoded token a sequence and promotes the one that leaves; see `Ops.decode_write`.

    One program per (sequence, KV head). The order in which heads take pages from the free stack is
    not fixed; what the pages hold is. Where the stack is empty the token goes to the null page.
    """
    (table, counts), (ring_k, ring_v, ring_flags) = heads, ring
    (batch, kv_heads, slots, dim), dim_v = ring_k.shape, ring_v.shape[3]
    check_dense(
        "decode_write",
        table=table,
        counts=counts,
        ring_k=ring_k,
        ring_v=ring_v,
        ring_flags=ring_flags,
        queries=ring_k if queries is None else queries,
    )
    key, value = dense_last(key), dense_last(value)
    # What is absent is not read: any tensor with as many dimensions stands for it.
    decided, group = flags is not None, 0
    flags = counts if flags is None else flags
    if query is None or queries is None:
        query, queries = key, ring_k
    else:
        query, group = dense_last(query), query.shape[1] // kv_heads
    if minmax:
        check_minmax("decode_write", pages)
    with on(ring_k):
        _decode_write[batch, kv_heads](
            pages.k, pages.v, pages.meta, pages.summary if minmax else pages.k, pages.slabs,
            pages.free, pages.top, pages.refs, table, counts, ring_k, ring_v, ring_flags,
            key, value, flags, query, queries, lengths, active, window, queries.shape[2],
            table.stride(), counts.stride(), ring_k.stride(), ring_v.stride(),
            ring_flags.stride(), key.stride(), value.stride(), flags.stride(),
            query.stride(), queries.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], SLOTS=slots, DIM=dim,
            DIM_V=dim_v, DIM_PAD=power_of_two(dim), DIM_V_PAD=power_of_two(dim_v), MINMAX=minmax,
            DECIDED=decided, BITS=bits, GROUP=group, num_warps=1,
        )  # fmt: skip


@triton.jit
def _decode_write(
    pages_k, pages_v, pages_meta, summary, slabs, free, top, refs, table, counts,
    ring_k, ring_v, ring_flags, key, value, flags, query, queries, lengths, active, window,
    query_slots, table_strides, counts_strides, ring_k_strides, ring_v_strides,
    ring_flags_strides, key_strides, value_strides, flags_strides, query_strides, queries_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, MINMAX: tl.constexpr,
    DECIDED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One KV head of a sequence: promotes the token that leaves, then writes the new one."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    if tl.load(active + b) == 0:
        return
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    real = d < DIM
    real_v = e < DIM_V
    ring_k += b * ring_k_strides[0] + h * ring_k_strides[1] + d
    ring_v += b * ring_v_strides[0] + h * ring_v_strides[1] + e
    ring_flags += b * ring_flags_strides[0] + h * ring_flags_strides[1]
    length = tl.load(lengths + b).to(tl.int32)
    leaving = length - window
    out = tl.maximum(leaving, 0) % SLOTS
    new_k = tl.load(key + b * key_strides[0] + h * key_strides[1] + d, mask=real, other=0.0)  # [D]
    from_v = value + b * value_strides[0] + h * value_strides[1] + e
    new_v = tl.load(from_v, mask=real_v, other=0.0)  # [Dv]
    new_flags = tl.full([], BITS, tl.uint8)
    if DECIDED:
        new_flags |= tl.load(flags + b * flags_strides[0] + h * flags_strides[1])
    out_flags = tl.load(ring_flags + out)
    if (leaving >= 0) & ((out_flags & _ADMITTED) != 0):
        held = counts + b * counts_strides[0] + h
        count = tl.load(held)
        page, slot = _next_slot(
            table + b * table_strides[0] + h * table_strides[1], count, free, top, refs, PAGE
        )
        k = tl.load(ring_k + out.to(tl.int64) * ring_k_strides[2], mask=real, other=0.0)  # [D]
        v = tl.load(ring_v + out.to(tl.int64) * ring_v_strides[2], mask=real_v, other=0.0)  # [Dv]
        to_k = page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM) + (slot * DIM + d)
        tl.store(pages_k + to_k, k, mask=real)
        to_v = page_offset(slabs, page, VALUES, SLAB_PAGES, PAGE * DIM_V) + (slot * DIM_V + e)
        tl.store(pages_v + to_v, v, mask=real_v)
        mark = ((out_flags & _MARKED) != 0).to(tl.int32) << _POSITION_BITS
        to_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot
        tl.store(pages_meta + to_meta, leaving | mark)
        if MINMAX:
            extent = summary + page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM) + d
            _extend(extent, k.to(tl.float32), slot, real, DIM)
        # Everyone has read the count before one thread replaces it.
        tl.debug_barrier()
        tl.store(held, count + 1)
    # With as many slots as the window is wide, the new token takes the place of the leaving one.
    tl.debug_barrier()
    into = length % SLOTS
    tl.store(ring_k + into.to(tl.int64) * ring_k_strides[2], new_k, mask=real)
    tl.store(ring_v + into.to(tl.int64) * ring_v_strides[2], new_v, mask=real_v)
    tl.store(ring_flags + into, new_flags)
    queries += b * queries_strides[0] + (length % query_slots).to(tl.int64) * queries_strides[2]
    for g in tl.static_range(GROUP):
        at = h * GROUP + g
        row = tl.load(
            query + b * query_strides[0] + at * query_strides[1] + d, mask=real, other=0.0
        )
        tl.store(queries + at * queries_strides[1] + d, row, mask=real)


@triton.jit
def _next_slot(table, count, free, top, refs, PAGE: tl.constexpr):
    """Page and slot of a head's next token; a page from the free stack if the last one is full."""
    slot = count % PAGE
    entry = table + count // PAGE
    if slot == 0:
        height = tl.atomic_add(top, -1)
        page = height * 0
        if height > 0:
            page = tl.load(free + height - 1)
            tl.store(refs + page, 1)
        tl.store(entry, page)
    else:
        page = tl.load(entry)
    return page, slot


@triton.jit
def _extend(extent, key, slot, real, DIM: tl.constexpr):
    """Extends a page's minimum and maximum, at `extent` and DIM further on, by a key `[D]`."""
    low = key
    high = key
    if slot > 0:
        low = tl.minimum(low, tl.load(extent, mask=real, other=0.0).to(tl.float32))
        high = tl.maximum(high, tl.load(extent + DIM, mask=real, other=0.0).to(tl.float32))
    tl.store(extent, narrow(low, extent.dtype.element_ty), mask=real)
    tl.store(extent + DIM, narrow(high, extent.dtype.element_ty), mask=real)
