"""Choosing the pages that a query reads: scores through the page table, then the best of them.

The best pages come from a radix search for the lowest score that is still taken, eight bits a pass,
so no sort is needed, nothing depends on the host, and pages come out in rising order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Pages
from ._launch import cdiv, check_dtype, dense_last, dot_size, on, power_of_two
from ._math import dot, narrow
from ._slabs import SUMMARY, page_offset

_GROUPS = {"max": 0, "mean": 1, "each": 2}
_MAX_BLOCK = 4096  # pages that one step of the search looks at


def quest_select(
    pages: Pages,
    table: Tensor,
    counts: Tensor,
    query: Tensor,
    budget: int,
    group: str,
    first: int,
    last: int,
) -> Tensor:
    """Quest's choice `[B, Hkv or Hq, budget]`: pages by a bound of q.k; see the reference."""
    check_dtype("quest_select", "query", query)
    assert pages.summary is not None
    batch, kv_heads, width = table.shape
    heads, dim = query.shape[1:]
    size = pages.k.shape[1]
    query, table, counts = dense_last(query), dense_last(table), dense_last(counts)
    out_heads = heads if group == "each" else kv_heads
    scores = torch.empty(batch, out_heads, width, dtype=torch.float32, device=query.device)
    block = max(16, min(64, 16384 // (dot_size(dim) * query.element_size())))
    with on(query):
        _quest_scores[cdiv(width, block), kv_heads, batch](
            pages.summary, pages.slabs, table, counts, query, scores, width,
            table.stride(0), table.stride(1), counts.stride(0), query.stride(0), query.stride(1),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
            GROUP_PAD=dot_size(heads // kv_heads), DIM=dim, DIM_PAD=dot_size(dim),
            COMBINE=_GROUPS[group], BLOCK=block, num_warps=4,
        )  # fmt: skip
    return top_pages(scores, counts, size, budget, first, last)


@triton.jit
def _quest_scores(
    summary, slabs, table, counts, query, scores, width,
    table_b, table_h, counts_b, query_b, query_h,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    COMBINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = (tl.load(counts + b * counts_b + h) + PAGE - 1) // PAGE
    if tl.program_id(0) * BLOCK >= held:
        return
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    there = n < tl.minimum(held, width)
    page = tl.load(table + b * table_b + h * table_h + n, mask=there, other=0)
    at = page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM)[:, None] + d[None, :]
    mask = there[:, None] & (d < DIM)[None, :]
    low = tl.load(summary + at, mask=mask, other=0.0)
    high = tl.load(summary + at + DIM, mask=mask, other=0.0)
    q = tl.load(
        query + b * query_b + (h * GROUP + g[:, None]) * query_h + d[None, :],
        mask=(g < GROUP)[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    # max(q * low, q * high) is q * high where q is positive and q * low elsewhere: two products.
    above = narrow(tl.maximum(q, 0.0), query.dtype.element_ty).to(high.dtype)
    below = narrow(tl.minimum(q, 0.0), query.dtype.element_ty).to(low.dtype)
    score = dot(above, tl.trans(high), tl.zeros([GROUP_PAD, BLOCK], tl.float32))
    score = dot(below, tl.trans(low), score)
    if COMBINE == 2:
        to = scores + ((b * KV_HEADS + h) * GROUP + g[:, None]) * width + n[None, :]
        tl.store(to, score, mask=(g < GROUP)[:, None] & there[None, :])
    else:
        if COMBINE == 0:
            best = tl.max(tl.where((g < GROUP)[:, None], score, float("-inf")), 0)
        else:
            best = tl.sum(tl.where((g < GROUP)[:, None], score, 0.0), 0) / GROUP
        tl.store(scores + (b * KV_HEADS + h) * width + n, best, mask=there)


def top_pages(
    scores: Tensor, counts: Tensor, page_size: int, budget: int, first: int, last: int
) -> Tensor:
    """The `budget` best pages of each head `[B, Hs, budget]`; see the reference."""
    batch, heads, width = scores.shape
    scores, counts = scores.contiguous(), dense_last(counts)
    out = torch.empty(batch, heads, budget, dtype=torch.int32, device=scores.device)
    block = min(max(power_of_two(width), 128), _MAX_BLOCK)
    with on(scores):
        _top_pages[batch, heads](
            scores, counts, out, width, counts.stride(0),
            HEADS=heads, REPEAT=heads // counts.shape[1], PAGE=page_size, BUDGET=budget,
            FIRST=first, LAST=last, BLOCK=block, FILL=power_of_two(budget),
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return out


@triton.jit
def _rank(scores, n, low, held, FIRST: tl.constexpr, LAST: tl.constexpr, BUDGET: tl.constexpr):
    """Whether pages n may be taken, and integers that rise with their precedence."""
    there = (n >= low) & (n < held)
    # Adding zero makes -0 and 0 equal, as they are as scores.
    score = tl.load(scores + n, mask=there, other=0.0).to(tl.float32) + 0.0
    score = tl.where(n < FIRST, float("inf"), score)
    bits = score.to(tl.uint32, bitcast=True)
    rank = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    if LAST < BUDGET:
        rank = tl.where(n >= held - LAST, 0xFFFFFFFF, rank)
    return there, rank


@triton.jit
def _top_pages(
    scores, counts, out, width, counts_b,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, PAGE: tl.constexpr, BUDGET: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    held = tl.minimum((tl.load(counts + b * counts_b + h // REPEAT) + PAGE - 1) // PAGE, width)
    scores += (b * HEADS + h) * width
    out += (b * HEADS + h) * BUDGET
    low = 0
    if LAST >= BUDGET:
        low = tl.maximum(held - LAST, 0)  # only trailing pages have a chance
    wanted = tl.minimum(held - low, BUDGET)
    n = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    # The rank of the last page taken, and how many pages of that rank are.
    border = (held * 0).to(tl.uint32)
    left = wanted
    for step in tl.static_range(4):
        found = tl.zeros([256], tl.int32)
        for start in range(0, held, BLOCK):
            there, rank = _rank(scores, start + n, low, held, FIRST, LAST, BUDGET)
            if step > 0:
                there = there & ((rank >> (32 - 8 * step)) == border)
            byte = ((rank >> (24 - 8 * step)) & 255).to(tl.int32)
            found += tl.histogram(byte, 256, mask=there)
        least = tl.cumsum(found, 0, reverse=True)  # pages whose digit is at least this
        digit = tl.maximum(tl.sum((least >= left).to(tl.int32), 0) - 1, 0)
        left -= tl.sum(tl.where(digits > digit, found, 0), 0)
        border = border * 256 + digit.to(tl.uint32)
    taken = 0
    ties = 0
    for start in range(0, held, BLOCK):
        there, rank = _rank(scores, start + n, low, held, FIRST, LAST, BUDGET)
        tie = there & (rank == border)
        order = ties + tl.cumsum(tie.to(tl.int32), 0)
        take = there & ((rank > border) | (tie & (order <= left)))
        place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + place, start + n, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        ties += tl.sum(tie.to(tl.int32), 0)
    rest = tl.arange(0, FILL)
    tl.store(out + rest, tl.full([FILL], -1, tl.int32), mask=(rest >= wanted) & (rest < BUDGET))
