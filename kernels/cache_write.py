"""Writing tokens: into pages after a prompt call, into ring and pages for a decoded token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, MARKED, POSITION_BITS, Heads, Pages, Ring
from ._launch import cdiv, check_dense, dense_last, on, power_of_two
from ._math import narrow
from ._slabs import KEYS, META, SUMMARY, VALUES, page_offset

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
    heads, tokens, dim = key.shape
    if tokens == 0:
        return
    key, value = dense_last(key), dense_last(value)
    table, meta, dest = dense_last(table), dense_last(meta), dense_last(dest)
    with on(pages.k):
        _append[cdiv(tokens, _APPEND_TOKENS), heads](
            pages.k, pages.v, pages.meta, pages.slabs, table, key, value, meta, dest, rows, tokens,
            table.stride(0), table.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), meta.stride(0), dest.stride(0),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], DIM=dim,
            DIM_PAD=power_of_two(dim), TOKENS=_APPEND_TOKENS, num_warps=4,
        )  # fmt: skip


@triton.jit
def _append(
    pages_k, pages_v, pages_meta, slabs, table, key, value, meta, dest, rows, tokens,
    table_b, table_h, key_h, key_t, value_h, value_t, meta_h, dest_h,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM_PAD)
    index = tl.load(dest + head * dest_h + t, mask=t < tokens, other=-1)
    stored = index >= 0
    row = tl.load(rows + t, mask=stored, other=0).to(tl.int64)
    page = tl.load(table + row * table_b + head * table_h + index // PAGE, mask=stored, other=0)
    slot = index % PAGE
    to = slot[:, None] * DIM + d[None, :]
    mask = stored[:, None] & (d < DIM)[None, :]
    at_k = page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM)
    k = tl.load(key + head * key_h + t[:, None] * key_t + d[None, :], mask=mask, other=0.0)
    tl.store(pages_k + at_k[:, None] + to, k, mask=mask)
    at_v = page_offset(slabs, page, VALUES, SLAB_PAGES, PAGE * DIM)
    v = tl.load(value + head * value_h + t[:, None] * value_t + d[None, :], mask=mask, other=0.0)
    tl.store(pages_v + at_v[:, None] + to, v, mask=mask)
    at_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE)
    about = tl.load(meta + head * meta_h + t, mask=stored, other=0)
    tl.store(pages_meta + at_meta + slot, about, mask=stored)


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
    batch, kv_heads, slots, dim = ring_k.shape
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
    summary = pages.summary
    if minmax and (summary is None or summary.shape[1] != 2 * dim):
        raise ValueError(f"decode_write: minmax wants summaries [n, {2 * dim}] in pages.summary")
    with on(ring_k):
        _decode_write[batch, kv_heads](
            pages.k, pages.v, pages.meta, summary if minmax else pages.k, pages.slabs,
            pages.free, pages.top, pages.refs, table, counts, ring_k, ring_v, ring_flags,
            key, value, flags, query, queries, lengths, active, window, queries.shape[2],
            table.stride(0), table.stride(1), counts.stride(0),
            ring_k.stride(0), ring_k.stride(1), ring_k.stride(2),
            ring_v.stride(0), ring_v.stride(1), ring_v.stride(2),
            ring_flags.stride(0), ring_flags.stride(1),
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            flags.stride(0), flags.stride(1), query.stride(0), query.stride(1),
            queries.stride(0), queries.stride(1), queries.stride(2),
            SLAB_PAGES=pages.slab_pages, PAGE=pages.k.shape[1], SLOTS=slots, DIM=dim,
            DIM_PAD=power_of_two(dim), MINMAX=minmax, DECIDED=decided, BITS=bits,
            GROUP=group, num_warps=1,
        )  # fmt: skip


@triton.jit
def _decode_write(
    pages_k, pages_v, pages_meta, summary, slabs, free, top, refs, table, counts,
    ring_k, ring_v, ring_flags, key, value, flags, query, queries, lengths, active, window,
    query_slots, table_b, table_h, counts_b,
    ring_k_b, ring_k_h, ring_k_s, ring_v_b, ring_v_h, ring_v_s,
    ring_flags_b, ring_flags_h, key_b, key_h, value_b, value_h, flags_b, flags_h,
    query_b, query_h, queries_b, queries_h, queries_s,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, MINMAX: tl.constexpr, DECIDED: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    if tl.load(active + b) == 0:
        return
    d = tl.arange(0, DIM_PAD)
    real = d < DIM
    ring_k += b * ring_k_b + h * ring_k_h + d
    ring_v += b * ring_v_b + h * ring_v_h + d
    ring_flags += b * ring_flags_b + h * ring_flags_h
    length = tl.load(lengths + b).to(tl.int32)
    leaving = length - window
    out = tl.maximum(leaving, 0) % SLOTS
    new_k = tl.load(key + b * key_b + h * key_h + d, mask=real, other=0.0)
    new_v = tl.load(value + b * value_b + h * value_h + d, mask=real, other=0.0)
    new_flags = tl.full([], BITS, tl.uint8)
    if DECIDED:
        new_flags |= tl.load(flags + b * flags_b + h * flags_h)
    out_flags = tl.load(ring_flags + out)
    if (leaving >= 0) & ((out_flags & _ADMITTED) != 0):
        held = counts + b * counts_b + h
        count = tl.load(held)
        slot = count % PAGE
        entry = table + b * table_b + h * table_h + count // PAGE
        if slot == 0:
            height = tl.atomic_add(top, -1)
            page = height * 0
            if height > 0:
                page = tl.load(free + height - 1)
                tl.store(refs + page, 1)
            tl.store(entry, page)
        else:
            page = tl.load(entry)
        k = tl.load(ring_k + out.to(tl.int64) * ring_k_s, mask=real, other=0.0)
        v = tl.load(ring_v + out.to(tl.int64) * ring_v_s, mask=real, other=0.0)
        at = slot * DIM + d
        tl.store(
            pages_k + page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM) + at, k, mask=real
        )
        tl.store(
            pages_v + page_offset(slabs, page, VALUES, SLAB_PAGES, PAGE * DIM) + at, v, mask=real
        )
        mark = ((out_flags & _MARKED) != 0).to(tl.int32) << _POSITION_BITS
        tl.store(
            pages_meta + page_offset(slabs, page, META, SLAB_PAGES, PAGE) + slot, leaving | mark
        )
        if MINMAX:
            extent = summary + page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM) + d
            low = k.to(tl.float32)
            high = low
            if slot > 0:
                low = tl.minimum(low, tl.load(extent, mask=real, other=0.0).to(tl.float32))
                high = tl.maximum(high, tl.load(extent + DIM, mask=real, other=0.0).to(tl.float32))
            tl.store(extent, narrow(low, summary.dtype.element_ty), mask=real)
            tl.store(extent + DIM, narrow(high, summary.dtype.element_ty), mask=real)
        # Everyone has read the count before one thread replaces it.
        tl.debug_barrier()
        tl.store(held, count + 1)
    # With as many slots as the window is wide, the new token takes the place of the leaving one.
    tl.debug_barrier()
    into = length % SLOTS
    tl.store(ring_k + into.to(tl.int64) * ring_k_s, new_k, mask=real)
    tl.store(ring_v + into.to(tl.int64) * ring_v_s, new_v, mask=real)
    tl.store(ring_flags + into, new_flags)
    for g in tl.static_range(GROUP):
        at = h * GROUP + g
        row = tl.load(query + b * query_b + at * query_h + d, mask=real, other=0.0)
        seen = (length % query_slots).to(tl.int64) * queries_s
        tl.store(queries + b * queries_b + at * queries_h + seen + d, row, mask=real)
