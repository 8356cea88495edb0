"""Attention of one decoded token a sequence over ring and pages: split-KV and a reduction.

A launch has a fixed number of programs. Each derives the same plan from the lengths on the device:
the blocks of all heads (ring first, then pages) are cut into splits of about equal size, so that
ragged heads keep every multiprocessor busy to the end, and program i takes split i.

An address in a page takes two loads, page id and slab, before the key itself. Both run ahead of the
loop over blocks, in registers: the pipeliner would otherwise give them the stages that keys and
values need to be in flight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import POSITION_MASK, Heads, Pages, Ring, check_asked
from ._launch import (
    cdiv,
    check_dims,
    check_dtype,
    dense_last,
    dot_size,
    on,
    power_of_two,
    processors,
    shared_memory,
)
from ._math import narrow
from ._overlap import await_before, dependent, let_next, overlaps
from ._pages import KEYS, META, VALUES, offset_in, page_offset, row_pointers, slab_start
from ._softmax import LOG2E, attend_step, factors, level_of, merge, normalised

_LOG2E = tl.constexpr(LOG2E)
_POSITION_MASK = tl.constexpr(POSITION_MASK)
_BLOCK = 64  # tokens, where their keys and values are not more bytes than this:
_STAGE = 32768
_STAGES = 3  # blocks that are multiplied or on their way
_WARPS = 4
_WAVES = 2  # programs a multiprocessor should get
_MIN_SPLIT = 128  # tokens; smaller splits cost more in the reduction than they gain
_PARTS = 64  # partial results that the reduction reads at once, as long as no more numbers:
_READ = 16384


def paged_decode(
    query: Tensor,
    pages: Pages,
    heads: Heads,
    ring: Ring,
    lengths: Tensor,
    active: Tensor,
    window: int,
    scale: float,
    selected: Tensor | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attends over the local window and the global tokens; see `Ops.paged_decode`.

    The result does not depend on how programs are scheduled.
    """
    check_dtype("paged_decode", "query", query)
    check_asked("paged_decode", query.shape[1], softcap, sinks, chunk)
    _, kv_heads, slots, dim = ring.k.shape
    batch, size, dim_v = query.shape[0], pages.k.shape[1], ring.v.shape[3]
    check_dims("paged_decode", dim, dim_v)
    readers = kv_heads if selected is None else selected.shape[1]
    group = query.shape[1] // readers
    units = batch * readers
    query, table, counts = dense_last(query), dense_last(heads.table), dense_last(heads.counts)
    ring_k, ring_v = dense_last(ring.k), dense_last(ring.v)
    picked = table if selected is None else dense_last(selected)
    widths = dot_size(dim), dot_size(dim_v)
    block, stages = _tile(sum(widths), query.element_size(), shared_memory(query.device))
    target = max(_WAVES * processors(query.device) - units, processors(query.device))
    programs = target + units
    out = torch.empty(*query.shape[:2], dim_v, dtype=query.dtype, device=query.device)
    part = torch.empty(programs, group, dim_v, dtype=torch.float32, device=query.device)
    lse = torch.empty(programs, group, dtype=torch.float32, device=query.device)
    plan = dict(
        UNITS_PAD=power_of_two(units), HEADS=readers, REPEAT=readers // kv_heads,
        RING_BLOCKS=cdiv(slots, block), BLOCK=block,
        PICKED=-1 if selected is None else selected.shape[2] * size,
        MIN_BLOCKS=cdiv(_MIN_SPLIT, block), GROUP=group, DIM_V=dim_v,
        OVERLAP=overlaps(query.device),
    )  # fmt: skip
    scale, cap = factors(scale, softcap)
    # What is None is no argument of the kernel that is compiled.
    meta = None if chunk is None else pages.meta
    sinks = None if sinks is None else sinks.contiguous()
    with on(query):
        _split[programs,](
            query, pages.k, pages.v, pages.slabs, table, counts, ring_k, ring_v, lengths, active,
            picked, part, lse, window, scale, cap, chunk, meta, rows, units, target,
            query.stride(), table.stride(), counts.stride(), ring_k.stride(), ring_v.stride(),
            picked.stride(),
            **plan, SLAB_PAGES=pages.slab_pages, PAGE=size, SLOTS=slots, GROUP_PAD=dot_size(group),
            DIM=dim, DIM_PAD=widths[0], DIM_V_PAD=widths[1], num_warps=_WARPS, num_stages=stages,
        )  # fmt: skip
        _reduce[units, group](
            part, lse, counts, active, out, sinks, rows, units, target, counts.stride(),
            **plan, PARTS=min(_PARTS, _READ // power_of_two(dim_v)), DIM_PAD=power_of_two(dim_v),
            num_warps=4,
            **dependent(query.device),
        )  # fmt: skip
    return out


def _tile(width: int, itemsize: int, shared: int) -> tuple[int, int]:
    """Tokens a block and pipeline stages, of which one less is held in shared memory.

    `width` counts channels of a key and its value.
    """
    fit = _STAGE // (width * itemsize)
    block = max(16, min(_BLOCK, power_of_two(fit + 1) // 2))
    stage = block * width * itemsize
    return block, min(_STAGES, 1 + (shared - 16384) // stage)


@triton.jit
def _sequence(rows, n, there):
    """The sequence of query n: it has the same number, or `rows` say it."""
    if rows is not None:
        n = tl.load(rows + n, mask=there, other=0)
    return n.to(tl.int64)


@triton.jit
def _plan(
    counts, active, rows, counts_strides, units, many, target, HEADS: tl.constexpr,
    REPEAT: tl.constexpr, RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Tokens, blocks and splits of each unit (a head of a sequence), as this and `_reduce` see it.

    Blocks are those of the unit's ring, then those of its pages. Splits have one length over all
    units, of which there are `many`, rounded; there are at most `target + many` of them.
    """
    b = _sequence(rows, units // HEADS, units < many)
    runs = tl.load(active + b, mask=units < many, other=0) != 0
    counts += b * counts_strides[0] + (units % HEADS) // REPEAT
    held = tl.load(counts, mask=units < many, other=0)  # [UNITS]
    if PICKED >= 0:
        blocks = units * 0 + (RING_BLOCKS + (PICKED + BLOCK - 1) // BLOCK)
    else:
        blocks = RING_BLOCKS + (held + BLOCK - 1) // BLOCK
    blocks = tl.where(runs, blocks, 0)
    whole = tl.maximum(tl.sum(blocks, 0), 1).to(tl.int64)
    share = ((blocks.to(tl.int64) * target + whole - 1) // whole).to(tl.int32)
    return held, blocks, tl.minimum(share, (blocks + MIN_BLOCKS - 1) // MIN_BLOCKS)


@triton.jit
def _find(
    table, picked, block, count, n,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Pages of a block's tokens and how many tokens of each are seen.

    One of each where a page holds the whole block, else one for every token. How many are seen is
    said of picked pages only; none of a page that was not picked.
    """
    place = block * BLOCK // PAGE if PAGE % BLOCK == 0 else (block * BLOCK + n) // PAGE
    if PICKED >= 0:
        page = tl.load(picked + place, mask=place * PAGE < PICKED, other=-1)
        room = tl.where(page >= 0, count - page * PAGE, -1)
        held = tl.load(table + page, mask=room > 0, other=0)
    else:
        room = block * 0
        held = tl.load(table + place, mask=place * PAGE < count, other=0)
    return held, room


@triton.jit
def _place(
    slabs, page, room, block, count, n, pages_meta, begins, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, SLAB_PAGES: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Slabs of a block's pages, each page's number in its slab; place of tokens, whether seen."""
    slab_k = slab_start(slabs, page, KEYS, SLAB_PAGES)
    slab_v = slab_start(slabs, page, VALUES, SLAB_PAGES)
    at = (block * BLOCK + n) % PAGE
    if PAGE % BLOCK == 0:
        at = block * BLOCK % PAGE + n
    seen = at < room if PICKED >= 0 else block * BLOCK + n < count
    if pages_meta is not None:  # only tokens of the chunk that `begins` there
        meta = pages_meta + page_offset(slabs, page, META, SLAB_PAGES, PAGE) + at
        seen = seen & ((tl.load(meta, mask=seen, other=0) & _POSITION_MASK) >= begins)
    return slab_k, slab_v, page % SLAB_PAGES, at, seen


@triton.jit
def _rows(store, slab, nth, at, d, DIM: tl.constexpr, PAGE: tl.constexpr):
    """Addresses of tokens `at` of a page or of one page each."""
    return row_pointers(store, offset_in(slab, nth, PAGE * DIM), at, d, DIM)


@triton.jit
def _my_split(
    program, counts, active, lengths, rows, counts_strides, many, target,
    UNITS_PAD: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr, MIN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Unit of a program (`many`: none), its blocks `low` to `high`, its tokens and its length."""
    units = tl.arange(0, UNITS_PAD)
    # Needed after the plan, loaded beside it.
    b = _sequence(rows, units // HEADS, units < many)
    stands = tl.load(lengths + b, mask=units < many, other=0).to(tl.int32)  # [UNITS]
    held, blocks, splits = _plan(
        counts, active, rows, counts_strides, units, many, target, HEADS, REPEAT, RING_BLOCKS,
        BLOCK, PICKED, MIN_BLOCKS,
    )  # fmt: skip
    ends = tl.cumsum(splits, 0)
    mine = (ends - splits <= program) & (program < ends)
    unit = tl.sum((ends <= program).to(tl.int32), 0)
    split = program - tl.sum(tl.where(mine, ends - splits, 0), 0)
    of = tl.maximum(tl.sum(tl.where(mine, splits, 0), 0), 1)
    here = tl.sum(tl.where(mine, blocks, 0), 0)
    count = tl.sum(tl.where(mine, held, 0), 0)
    length = tl.sum(tl.where(mine, stands, 0), 0)
    low = split * (here // of) + tl.minimum(split, here % of)
    high = low + here // of + (split < here % of).to(tl.int32)
    return unit, low, high, count, length


# Numbers that differ from batch to batch: batches of the same padded size share a kernel.
@triton.jit(do_not_specialize=["many", "target"])
def _split(
    query, pages_k, pages_v, slabs, table, counts, ring_k, ring_v, lengths, active,
    picked, part, lse, window, scale, cap, chunk, pages_meta, rows, many, target,
    query_strides, table_strides, counts_strides, ring_k_strides, ring_v_strides, picked_strides,
    UNITS_PAD: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr,
    MIN_BLOCKS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of a unit's query heads over one split of its blocks, with its log-sum-exps."""
    let_next(OVERLAP)
    program = tl.program_id(0)
    unit, low, high, count, length = _my_split(
        program, counts, active, lengths, rows, counts_strides, many, target, UNITS_PAD, HEADS,
        REPEAT, RING_BLOCKS, BLOCK, PICKED, MIN_BLOCKS,
    )  # fmt: skip
    if unit >= many:
        return
    asked = (unit // HEADS).to(tl.int64)
    b = _sequence(rows, asked, True)
    head = (unit % HEADS).to(tl.int64)
    kv_head = head // REPEAT
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    n = tl.arange(0, BLOCK)
    begins = length * 0
    if chunk is not None:
        begins = length // chunk * chunk
        window = tl.minimum(window, length - begins + 1)
    table += b * table_strides[0] + kv_head * table_strides[1]
    picked += asked * picked_strides[0] + head * picked_strides[1]
    # Pages are found two blocks ahead, where they lie one. What a block leaves to the next are new
    # values, never those that it got itself: a loop that passes on its arguments is not pipelined.
    first = tl.maximum(low - RING_BLOCKS, 0)
    page, room = _find(table, picked, first, count, n, BLOCK, PAGE, PICKED)
    next_page, next_room = _find(table, picked, first + 1, count, n, BLOCK, PAGE, PICKED)
    query += asked * query_strides[0]
    q = tl.load(
        query + (head * GROUP + g[:, None]) * query_strides[1] + d[None, :],
        mask=(g < GROUP)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # [G, D]  # fmt: skip
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_V_PAD], tl.float32)

    ring_k += b * ring_k_strides[0] + kv_head * ring_k_strides[1]
    ring_v += b * ring_v_strides[0] + kv_head * ring_v_strides[1]
    for block in range(low, tl.minimum(high, RING_BLOCKS)):
        slot = block * BLOCK + n
        back = (length - slot + SLOTS) % SLOTS
        seen = (slot < SLOTS) & (back < window) & (back <= length)
        there = seen[:, None]
        at = slot.to(tl.int64)[:, None]
        from_k = ring_k + at * ring_k_strides[2] + d[None, :]
        k = tl.load(from_k, mask=there & (d < DIM)[None, :], other=0.0)  # [N, D]
        from_v = ring_v + at * ring_v_strides[2] + e[None, :]
        v = tl.load(from_v, mask=there & (e < DIM_V)[None, :], other=0.0)  # [N, Dv]
        top, total, acc = attend_step(q, k, v, seen[None, :], scale, cap, top, total, acc, True)

    slab_k, slab_v, nth, at, seen = _place(
        slabs, page, room, first, count, n, pages_meta, begins, BLOCK, PAGE, SLAB_PAGES, PICKED
    )
    for block in range(first, high - RING_BLOCKS):
        there = seen[:, None]
        from_k = _rows(pages_k, slab_k, nth, at, d, DIM, PAGE)
        k = tl.load(from_k, mask=there & (d < DIM)[None, :], other=0.0)  # [N, D]
        from_v = _rows(pages_v, slab_v, nth, at, e, DIM_V, PAGE)
        v = tl.load(from_v, mask=there & (e < DIM_V)[None, :], other=0.0)  # [N, Dv]
        top, total, acc = attend_step(q, k, v, seen[None, :], scale, cap, top, total, acc, True)
        slab_k, slab_v, nth, at, seen = _place(
            slabs, next_page, next_room, block + 1, count, n, pages_meta, begins, BLOCK, PAGE,
            SLAB_PAGES, PICKED,
        )  # fmt: skip
        next_page, next_room = _find(table, picked, block + 2, count, n, BLOCK, PAGE, PICKED)

    keep = g < GROUP
    at = program.to(tl.int64) * GROUP + g
    to = part + at[:, None] * DIM_V + e[None, :]
    tl.store(to, normalised(acc, total), mask=keep[:, None] & (e < DIM_V)[None, :])
    tl.store(lse + at, level_of(top, total), mask=keep)


@triton.jit(do_not_specialize=["many", "target"])
def _reduce(
    part, lse, counts, active, out, sinks, rows, many, target, counts_strides,
    UNITS_PAD: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr,
    MIN_BLOCKS: tl.constexpr, GROUP: tl.constexpr, DIM_V: tl.constexpr,
    PARTS: tl.constexpr, DIM_PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one query head in their order, after its sink."""
    unit = tl.program_id(0)
    g = tl.program_id(1)
    units = tl.arange(0, UNITS_PAD)
    # The plan rests on what was there before `_split` started.
    _, _, splits = _plan(
        counts, active, rows, counts_strides, units, many, target, HEADS, REPEAT, RING_BLOCKS,
        BLOCK, PICKED, MIN_BLOCKS,
    )  # fmt: skip
    first = tl.sum(tl.where(units < unit, splits, 0), 0)
    of = tl.sum(tl.where(units == unit, splits, 0), 0)
    top = float("-inf")
    total = 0.0
    if sinks is not None:
        top = tl.load(sinks + (unit % HEADS) * GROUP + g).to(tl.float32) * _LOG2E
        total = 1.0
    await_before(OVERLAP)
    d = tl.arange(0, DIM_PAD)
    i = tl.arange(0, PARTS)
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, of, PARTS):
        mask = start + i < of
        at = (first + start + i).to(tl.int64) * GROUP + g
        level = tl.load(lse + at, mask=mask, other=float("-inf"))  # [PARTS]
        parts = tl.load(
            part + at[:, None] * DIM_V + d[None, :],
            mask=mask[:, None] & (d < DIM_V)[None, :],
            other=0.0,
        )  # [PARTS, Dv]
        top, total, acc = merge(level, parts, top, total, acc)
    acc = acc / tl.where(total > 0, total, 1.0)
    to = out + (unit.to(tl.int64) * GROUP + g) * DIM_V + d
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=d < DIM_V)
