"""Choosing the pages that a query reads: scores through the page table, then the best of them.

The best pages come from a bisection for the lowest score that is still taken: no sort, nothing on
the host, and pages come out in rising order. One program a head holds all scores of the head in
registers where they fit, so that a step is a comparison and a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Pages
from ._launch import cdiv, check_dtype, dense_last, dot_size, on, power_of_two
from ._math import dot, narrow
from ._overlap import await_before, dependent, let_next, overlaps
from ._slabs import SUMMARY, page_offset

_GROUPS = {"max": 0, "mean": 1, "each": 2}
_SCORE_BLOCK = 64  # pages that one program scores
_SCORE_WARPS = 4
_MAX_BLOCK = 16384  # scores that one program holds; more are read again at each step
_THREAD = 8  # scores that one thread should hold


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
    row = 16 * cdiv(width, 16)  # rows start where 128 bits can be loaded
    scores = torch.empty(batch, out_heads, row, dtype=torch.float32, device=query.device)
    block = max(16, min(_SCORE_BLOCK, 16384 // (dot_size(dim) * query.element_size())))
    with on(query):
        _quest_scores[cdiv(width, block), kv_heads, batch](
            pages.summary, pages.slabs, table, counts, query, scores, width, row,
            table.stride(0), table.stride(1), counts.stride(0), query.stride(0), query.stride(1),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
            GROUP_PAD=dot_size(heads // kv_heads), DIM=dim, DIM_PAD=dot_size(dim),
            COMBINE=_GROUPS[group], BLOCK=block, OVERLAP=overlaps(query.device),
            num_warps=_SCORE_WARPS,
        )  # fmt: skip
        return _choose(scores, width, counts, size, budget, first, last, **dependent(query.device))


@triton.jit
def _quest_scores(
    summary, slabs, table, counts, query, scores, width, row,
    table_b, table_h, counts_b, query_b, query_h,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    COMBINE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next(OVERLAP)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    # Loaded beside the count; page ids past it are not used.
    page = tl.load(table + b * table_b + h * table_h + n, mask=n < width, other=0)
    q = tl.load(
        query + b * query_b + (h * GROUP + g[:, None]) * query_h + d[None, :],
        mask=(g < GROUP)[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    held = (tl.load(counts + b * counts_b + h) + PAGE - 1) // PAGE
    if tl.program_id(0) * BLOCK >= held:
        return
    there = n < tl.minimum(held, width)
    page = tl.where(there, page, 0)
    at = page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM)[:, None] + d[None, :]
    mask = there[:, None] & (d < DIM)[None, :]
    low = tl.load(summary + at, mask=mask, other=0.0)
    high = tl.load(summary + at + DIM, mask=mask, other=0.0)
    # max(q * low, q * high) is q * high where q is positive and q * low elsewhere: two products.
    above = narrow(tl.maximum(q, 0.0), query.dtype.element_ty).to(high.dtype)
    below = narrow(tl.minimum(q, 0.0), query.dtype.element_ty).to(low.dtype)
    score = dot(above, tl.trans(high), tl.zeros([GROUP_PAD, BLOCK], tl.float32))
    score = dot(below, tl.trans(low), score)
    if COMBINE == 2:
        to = scores + ((b * KV_HEADS + h) * GROUP + g[:, None]) * row + n[None, :]
        tl.store(to, score, mask=(g < GROUP)[:, None] & there[None, :])
    else:
        if COMBINE == 0:
            best = tl.max(tl.where((g < GROUP)[:, None], score, float("-inf")), 0)
        else:
            best = tl.sum(tl.where((g < GROUP)[:, None], score, 0.0), 0) / GROUP
        tl.store(scores + (b * KV_HEADS + h) * row + n, best, mask=there)


def top_pages(
    scores: Tensor, counts: Tensor, page_size: int, budget: int, first: int, last: int
) -> Tensor:
    """The `budget` best pages of each head `[B, Hs, budget]`; see the reference."""
    with on(scores):
        return _choose(scores.contiguous(), scores.shape[2], counts, page_size, budget, first, last)


def _choose(
    scores: Tensor, width: int, counts: Tensor, page_size: int, budget: int, first: int,
    last: int, **options: bool,
) -> Tensor:  # fmt: skip
    """`top_pages` of the first `width` scores of each row; `options` are those of the launch."""
    batch, heads, row = scores.shape
    counts = dense_last(counts)
    out = torch.empty(batch, heads, budget, dtype=torch.int32, device=scores.device)
    block = min(max(power_of_two(width), 128), _MAX_BLOCK)
    _top_pages[batch, heads](
        scores, counts, out, width, row, counts.stride(0),
        HEADS=heads, REPEAT=heads // counts.shape[1], PAGE=page_size, BUDGET=budget,
        FIRST=first, LAST=last, BLOCK=block, WHOLE=width <= block, FILL=power_of_two(budget),
        OVERLAP=bool(options), num_warps=min(max(block // (32 * _THREAD), 4), 16), **options,
    )  # fmt: skip
    return out


@triton.jit
def _rank(
    scores, n, low, held, FIRST: tl.constexpr, LAST: tl.constexpr, BUDGET: tl.constexpr
):  # fmt: skip
    """Integers that rise with the precedence of pages n; 0 for those that may not be taken."""
    there = (n >= low) & (n < held)
    # Adding zero makes -0 and 0 equal, as they are as scores.
    score = tl.load(scores + n, mask=there, other=0.0).to(tl.float32) + 0.0
    score = tl.where(n < FIRST, float("inf"), score)
    bits = score.to(tl.uint32, bitcast=True)
    # Only a NaN would have rank 0.
    rank = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    if LAST < BUDGET:
        rank = tl.where(n >= held - LAST, 0xFFFFFFFF, rank)
    return tl.where(there, rank, 0)


@triton.jit
def _range(
    rank, n, low, held, FIRST: tl.constexpr, LAST: tl.constexpr, BUDGET: tl.constexpr
):  # fmt: skip
    """Lowest and highest rank among the pages that the search is about."""
    open = (n >= low) & (n < held)
    if FIRST + LAST <= BUDGET:
        # The certain pages fit; without their ranks, which are apart, the search is shorter.
        open = open & (n >= FIRST) & (n < held - LAST)
    return (
        tl.min(tl.where(open, rank, 0xFFFFFFFF), 0),
        tl.max(tl.where(open, rank, 0), 0),
    )


@triton.jit
def _top_pages(
    scores, counts, out, width, row, counts_b,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, PAGE: tl.constexpr, BUDGET: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FILL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    held = tl.minimum((tl.load(counts + b * counts_b + h // REPEAT) + PAGE - 1) // PAGE, width)
    scores += (b * HEADS + h) * row
    out += (b * HEADS + h) * BUDGET
    low = held * 0
    if LAST >= BUDGET:
        low = tl.maximum(held - LAST, 0)  # only trailing pages have a chance
    wanted = tl.minimum(held - low, BUDGET)
    n = tl.arange(0, BLOCK)
    await_before(OVERLAP)

    # The lowest rank taken is the highest that `wanted` pages reach: at least `least`, at most
    # `most`. Until they meet, or a rank in between is reached by just as many.
    if WHOLE:
        rank = _rank(scores, n, low, held, FIRST, LAST, BUDGET)
        least, most = _range(rank, n, low, held, FIRST, LAST, BUDGET)
    else:
        least = (held * 0).to(tl.uint32) + 0xFFFFFFFF
        most = (held * 0).to(tl.uint32)
        for start in range(0, held, BLOCK):
            rank = _rank(scores, start + n, low, held, FIRST, LAST, BUDGET)
            lowest, highest = _range(rank, start + n, low, held, FIRST, LAST, BUDGET)
            least, most = tl.minimum(least, lowest), tl.maximum(most, highest)
    while least < most:
        middle = least + ((most - least) >> 1) + ((most - least) & 1)
        if WHOLE:
            reach = tl.sum((rank >= middle).to(tl.int32), 0)
        else:
            reach = held * 0
            for start in range(0, held, BLOCK):
                other = _rank(scores, start + n, low, held, FIRST, LAST, BUDGET)
                reach += tl.sum((other >= middle).to(tl.int32), 0)
        least = tl.where(reach >= wanted, middle, least)
        most = tl.where(reach > wanted, most, tl.where(reach == wanted, middle, middle - 1))

    above = held * 0  # pages of a higher rank, and of this one, in the blocks before
    equal = held * 0
    if WHOLE:
        reach = tl.sum((rank > most).to(tl.int32), 0)
        _write(out, rank, n, most, above, equal, wanted - reach)
    else:
        reach = held * 0
        for start in range(0, held, BLOCK):
            other = _rank(scores, start + n, low, held, FIRST, LAST, BUDGET)
            reach += tl.sum((other > most).to(tl.int32), 0)
        for start in range(0, held, BLOCK):
            other = _rank(scores, start + n, low, held, FIRST, LAST, BUDGET)
            above, equal = _write(out, other, start + n, most, above, equal, wanted - reach)
    rest = tl.arange(0, FILL)
    tl.store(out + rest, tl.full([FILL], -1, tl.int32), mask=(rest >= wanted) & (rest < BUDGET))


@triton.jit
def _write(out, rank, n, border, above, equal, left):
    """Stores those of pages n whose rank is above the border, and the first `left` that have it."""
    over = rank > border
    tie = (rank == border) & (rank > 0)
    # Both running counts at once: 16 bits hold those of a block.
    both = tl.cumsum(over.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    overs = above + (both & 0xFFFF)
    ties = equal + (both >> 16)
    place = overs + tl.minimum(ties, left) - 1
    tl.store(out + place, n, mask=over | (tie & (ties <= left)))
    return above + tl.sum(over.to(tl.int32), 0), equal + tl.sum(tie.to(tl.int32), 0)
