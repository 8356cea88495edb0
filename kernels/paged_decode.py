"""Attention of one decoded token a sequence over ring and pages: split-KV and a reduction.

A launch has a fixed number of programs. Each derives the same plan from the lengths on the device:
the blocks of all heads (ring first, then pages) are cut into splits of about equal size, so that
ragged heads keep every multiprocessor busy to the end, and program i takes split i.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Pages
from ._launch import (
    cdiv,
    check_dtype,
    dense_last,
    dot_size,
    on,
    power_of_two,
    processors,
    shared_memory,
)
from ._math import dot, narrow
from ._slabs import KEYS, VALUES, page_offset

_LOG2E = 1.4426950408889634
_WAVES = 2  # programs a multiprocessor should get
_MIN_SPLIT = 256  # tokens; smaller splits cost more in the reduction than they gain
_PARTS = 16  # partial results that the reduction reads at once


def paged_decode(
    query: Tensor,
    pages: Pages,
    table: Tensor,
    counts: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    lengths: Tensor,
    active: Tensor,
    window: int,
    scale: float,
    selected: Tensor | None = None,
) -> Tensor:
    """Attends over the local window and the global tokens; see the reference.

    The result does not depend on how programs are scheduled.
    """
    check_dtype("paged_decode", "query", query)
    batch, kv_heads, slots, dim = ring_k.shape
    query_heads = query.shape[1]
    size = pages.k.shape[1]
    heads = kv_heads if selected is None else selected.shape[1]
    group = query_heads // heads
    units = batch * heads
    query, table, counts = dense_last(query), dense_last(table), dense_last(counts)
    ring_k, ring_v = dense_last(ring_k), dense_last(ring_v)
    picked = table if selected is None else dense_last(selected)
    block, stages = _tile(dot_size(dim), query.element_size(), shared_memory(query.device))
    target = max(_WAVES * processors(query.device) - units, processors(query.device))
    programs = target + units
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    part = torch.empty(programs, group, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(programs, group, dtype=torch.float32, device=query.device)
    plan = dict(
        UNITS=units, UNITS_PAD=power_of_two(units), HEADS=heads, REPEAT=heads // kv_heads,
        RING_BLOCKS=cdiv(slots, block), BLOCK=block,
        PICKED=-1 if selected is None else selected.shape[2] * size,
        TARGET=target, MIN_BLOCKS=cdiv(_MIN_SPLIT, block), GROUP=group, DIM=dim,
    )  # fmt: skip
    with on(query):
        _split[programs,](
            query, pages.k, pages.v, pages.slabs, table, counts, ring_k, ring_v, lengths, active,
            picked, part, lse, window, scale * _LOG2E,
            query.stride(0), query.stride(1), table.stride(0), table.stride(1), counts.stride(0),
            ring_k.stride(0), ring_k.stride(1), ring_k.stride(2),
            ring_v.stride(0), ring_v.stride(1), ring_v.stride(2),
            picked.stride(0), picked.stride(1),
            **plan, SLAB_PAGES=pages.slab_pages, PAGE=size, SLOTS=slots,
            GROUP_PAD=dot_size(group), DIM_PAD=dot_size(dim), STAGES=stages, num_warps=4,
        )  # fmt: skip
        _reduce[units, group](
            part, lse, counts, active, out, counts.stride(0),
            **plan, PARTS=_PARTS, DIM_PAD=power_of_two(dim), num_warps=4,
        )  # fmt: skip
    return out


def _tile(dim: int, itemsize: int, shared: int) -> tuple[int, int]:
    """Tokens a block and pipeline stages: about 32 KB of keys and values a stage."""
    block = max(16, min(64, 16384 // (dim * itemsize)))
    stage = 2 * block * dim * itemsize
    return block, 3 if 3 * stage + 8192 <= shared else 2


@triton.jit
def _unit_blocks(
    counts, active, counts_b, unit, UNITS: tl.constexpr, HEADS: tl.constexpr,
    REPEAT: tl.constexpr, RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Blocks of each unit (a head of a sequence): those of its ring, then those of its pages."""
    b = (unit // HEADS).to(tl.int64)
    runs = tl.load(active + b, mask=unit < UNITS, other=0) != 0
    if PICKED >= 0:
        blocks = unit * 0 + (RING_BLOCKS + (PICKED + BLOCK - 1) // BLOCK)
    else:
        held = tl.load(counts + b * counts_b + (unit % HEADS) // REPEAT, mask=runs, other=0)
        blocks = RING_BLOCKS + (held + BLOCK - 1) // BLOCK
    return tl.where(runs, blocks, 0)


@triton.jit
def _unit_splits(blocks, TARGET: tl.constexpr, MIN_BLOCKS: tl.constexpr):
    """Splits of each unit: of one length over all units, at most TARGET + units of them."""
    length = tl.maximum((tl.sum(blocks, 0) + TARGET - 1) // TARGET, MIN_BLOCKS)
    return (blocks + length - 1) // length


@triton.jit
def _attend(q, k, v, seen, scale, high, total, acc):
    """One step of the online softmax; logarithms are to base 2."""
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_high = tl.maximum(high, tl.max(scores, 1))
    # A row that has seen nothing yet would compute inf - inf.
    base = tl.where(new_high == float("-inf"), 0.0, new_high)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(high - base)
    total = total * decay + tl.sum(weights, 1)
    acc = dot(narrow(weights, v.dtype), v, acc * decay[:, None])
    return new_high, total, acc


@triton.jit
def _split(
    query, pages_k, pages_v, slabs, table, counts, ring_k, ring_v, lengths, active,
    picked, part, lse, window, scale,
    query_b, query_h, table_b, table_h, counts_b,
    ring_k_b, ring_k_h, ring_k_s, ring_v_b, ring_v_h, ring_v_s, picked_b, picked_h,
    UNITS: tl.constexpr, UNITS_PAD: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr, TARGET: tl.constexpr,
    MIN_BLOCKS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM_PAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    units = tl.arange(0, UNITS_PAD)
    blocks = _unit_blocks(
        counts, active, counts_b, units, UNITS, HEADS, REPEAT, RING_BLOCKS, BLOCK, PICKED
    )
    splits = _unit_splits(blocks, TARGET, MIN_BLOCKS)
    unit = tl.sum((tl.cumsum(splits, 0) <= program).to(tl.int32), 0)
    if unit >= UNITS:
        return
    mine = units == unit
    split = program - tl.sum(tl.where(units < unit, splits, 0), 0)
    of = tl.sum(tl.where(mine, splits, 0), 0)
    here = tl.sum(tl.where(mine, blocks, 0), 0)
    low = split * here // of
    high = (split + 1) * here // of

    b = (unit // HEADS).to(tl.int64)
    head = (unit % HEADS).to(tl.int64)
    kv_head = head // REPEAT
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    real = d < DIM
    n = tl.arange(0, BLOCK)
    q = tl.load(
        query + b * query_b + (head * GROUP + g[:, None]) * query_h + d[None, :],
        mask=(g < GROUP)[:, None] & real[None, :],
        other=0.0,
    )
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)

    length = tl.load(lengths + b).to(tl.int32)
    ring_k += b * ring_k_b + kv_head * ring_k_h
    ring_v += b * ring_v_b + kv_head * ring_v_h
    for block in tl.range(low, tl.minimum(high, RING_BLOCKS), num_stages=STAGES):
        slot = block * BLOCK + n
        back = (length - slot + SLOTS) % SLOTS
        seen = (slot < SLOTS) & (back < window) & (back <= length)
        mask = seen[:, None] & real[None, :]
        at = slot.to(tl.int64)[:, None]
        k = tl.load(ring_k + at * ring_k_s + d[None, :], mask=mask, other=0.0)
        v = tl.load(ring_v + at * ring_v_s + d[None, :], mask=mask, other=0.0)
        top, total, acc = _attend(q, k, v, seen, scale, top, total, acc)

    count = tl.load(counts + b * counts_b + kv_head)
    table += b * table_b + kv_head * table_h
    picked += b * picked_b + head * picked_h
    for block in tl.range(tl.maximum(low, RING_BLOCKS), high, num_stages=STAGES):
        token = (block - RING_BLOCKS) * BLOCK + n
        if PICKED >= 0:
            page = tl.load(picked + token // PAGE, mask=token < PICKED, other=-1)
            seen = (page >= 0) & (page * PAGE + token % PAGE < count)
        else:
            page = token // PAGE
            seen = token < count
        held = tl.load(table + page, mask=seen, other=0)
        at = ((token % PAGE) * DIM)[:, None] + d[None, :]
        mask = seen[:, None] & real[None, :]
        from_k = page_offset(slabs, held, KEYS, SLAB_PAGES, PAGE * DIM)
        from_v = page_offset(slabs, held, VALUES, SLAB_PAGES, PAGE * DIM)
        k = tl.load(pages_k + from_k[:, None] + at, mask=mask, other=0.0)
        v = tl.load(pages_v + from_v[:, None] + at, mask=mask, other=0.0)
        top, total, acc = _attend(q, k, v, seen, scale, top, total, acc)

    keep = g < GROUP
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = program.to(tl.int64) * GROUP + g
    tl.store(part + at[:, None] * DIM + d[None, :], acc, mask=keep[:, None] & real[None, :])
    tl.store(lse + at, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=keep)


@triton.jit
def _reduce(
    part, lse, counts, active, out, counts_b,
    UNITS: tl.constexpr, UNITS_PAD: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    RING_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr, TARGET: tl.constexpr,
    MIN_BLOCKS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    PARTS: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    g = tl.program_id(1)
    units = tl.arange(0, UNITS_PAD)
    blocks = _unit_blocks(
        counts, active, counts_b, units, UNITS, HEADS, REPEAT, RING_BLOCKS, BLOCK, PICKED
    )
    splits = _unit_splits(blocks, TARGET, MIN_BLOCKS)
    first = tl.sum(tl.where(units < unit, splits, 0), 0)
    of = tl.sum(tl.where(units == unit, splits, 0), 0)
    d = tl.arange(0, DIM_PAD)
    i = tl.arange(0, PARTS)
    high = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, of, PARTS):
        mask = start + i < of
        at = (first + start + i).to(tl.int64) * GROUP + g
        level = tl.load(lse + at, mask=mask, other=float("-inf"))
        parts = tl.load(
            part + at[:, None] * DIM + d[None, :],
            mask=mask[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        new_high = tl.maximum(high, tl.max(level, 0))
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        weights = tl.exp2(level - base)
        decay = tl.exp2(high - base)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * parts, 0)
        high = new_high
    acc = acc / tl.where(total > 0, total, 1.0)
    to = out + (unit.to(tl.int64) * GROUP + g) * DIM + d
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=d < DIM)
