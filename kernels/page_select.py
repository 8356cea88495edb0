"""Choosing the pages that a query reads: scores through the page table, then the best of them.

The best pages come from a search for the lowest score that is still taken: no sort, nothing on the
host, and pages come out in rising order. One program a head looks at groups of neighbours first:
the best `budget` pages lie in the `budget` groups whose best pages are best, so that each of two
searches holds few scores, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages
from ._launch import cdiv, check_dtype, dense_last, dot_size, on, power_of_two
from ._math import dot, narrow
from ._overlap import await_before, dependent, let_next, overlaps
from ._pages import SUMMARY, page_offset

_GROUPS = {"max": 0, "mean": 1, "each": 2}
_SCORE_BLOCK = 64  # pages that one program scores
_SCORE_WARPS = 4
_CHANNELS = 1024  # bytes of each key's channels that are multiplied at once
_MAX_BLOCK = 16384  # scores that one program holds; more are read again at each step
_ONE_SEARCH = 2048  # scores that are searched at once rather than by groups
_THREAD = 8  # scores that one thread should hold


def quest_select(
    pages: Pages,
    heads: Heads,
    query: Tensor,
    budget: int,
    group: str,
    first: int,
    last: int,
) -> Tensor:
    """Quest's choice `[B, Hkv or Hq, budget]`: pages by a bound of q.k; see `Ops.quest_select`."""
    check_dtype("quest_select", "query", query)
    assert pages.summary is not None
    batch, kv_heads, width = heads.table.shape
    query_heads, dim = query.shape[1:]
    size, groups = pages.k.shape[1], query_heads // kv_heads
    query, table, counts = dense_last(query), dense_last(heads.table), dense_last(heads.counts)
    out_heads = query_heads if group == "each" else kv_heads
    row = 16 * cdiv(width, 16)  # rows start where 128 bits can be loaded
    scores = torch.empty(batch, out_heads, row, dtype=torch.float32, device=query.device)
    block = max(16, min(_SCORE_BLOCK, 16384 // (dot_size(dim) * query.element_size())))
    with on(query):
        _quest_scores[cdiv(width, block), kv_heads, batch](
            pages.summary, pages.slabs, table, counts, query, scores, width, row,
            table.stride(), counts.stride(), query.stride(),
            SLAB_PAGES=pages.slab_pages, PAGE=size, KV_HEADS=kv_heads, GROUP=groups,
            GROUP_PAD=dot_size(groups), DIM=dim, DIM_PAD=dot_size(dim),
            STEP=min(dot_size(dim), _CHANNELS // query.element_size()),
            COMBINE=_GROUPS[group], BLOCK=block, OVERLAP=overlaps(query.device),
            num_warps=_SCORE_WARPS,
        )  # fmt: skip
        return _choose(scores, width, counts, size, budget, first, last, **dependent(query.device))


@triton.jit
def _quest_scores(
    summary, slabs, table, counts, query, scores, width, row,
    table_strides, counts_strides, query_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    STEP: tl.constexpr, COMBINE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores of a block of pages of one KV head by the queries of its group."""
    let_next(OVERLAP)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, STEP)
    # Loaded beside the count; page ids past it are not used.
    table += b * table_strides[0] + h * table_strides[1]
    page = tl.load(table + n, mask=n < width, other=0)  # [N]
    query = query + b * query_strides[0] + (h * GROUP + g[:, None]) * query_strides[1]
    real = (g < GROUP)[:, None]
    q = tl.load(query + d[None, :], mask=real & (d < DIM)[None, :], other=0.0).to(tl.float32)
    held = (tl.load(counts + b * counts_strides[0] + h) + PAGE - 1) // PAGE
    if tl.program_id(0) * BLOCK >= held:
        return
    there = n < tl.minimum(held, width)
    page = tl.where(there, page, 0)
    at = page_offset(slabs, page, SUMMARY, SLAB_PAGES, 2 * DIM)[:, None]
    score = tl.zeros([GROUP_PAD, BLOCK], tl.float32)
    score = _add_bounds(q, summary, at, d, there, score, DIM, query.dtype.element_ty)
    for start in tl.range(STEP, DIM_PAD, STEP, num_stages=1):
        c = start + d
        q = tl.load(query + c[None, :], mask=real & (c < DIM)[None, :], other=0.0).to(tl.float32)
        score = _add_bounds(q, summary, at, c, there, score, DIM, query.dtype.element_ty)
    written = n < tl.minimum(held + 3, row)  # the choice loads 4 at once
    if COMBINE == 2:
        to = scores + ((b * KV_HEADS + h) * GROUP + g[:, None]) * row + n[None, :]
        tl.store(to, score, mask=(g < GROUP)[:, None] & written[None, :])
    else:
        if COMBINE == 0:
            best = tl.max(tl.where((g < GROUP)[:, None], score, float("-inf")), 0)
        else:
            best = tl.sum(tl.where((g < GROUP)[:, None], score, 0.0), 0) / GROUP
        tl.store(scores + (b * KV_HEADS + h) * row + n, best, mask=written)


@triton.jit
def _add_bounds(q, summary, at, d, there, score, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Adds to scores `[G, N]` what channels d of queries `[G, D]` give with the summaries `at`.

    `q` are float32, of a DTYPE to which they are rounded again.
    """
    at = at + d[None, :]
    mask = there[:, None] & (d < DIM)[None, :]
    low = tl.load(summary + at, mask=mask, other=0.0)  # [N, D]
    high = tl.load(summary + at + DIM, mask=mask, other=0.0)  # [N, D]
    # max(q * low, q * high) is q * high where q is positive and q * low elsewhere: two products.
    above = narrow(tl.maximum(q, 0.0), DTYPE).to(high.dtype)
    below = narrow(tl.minimum(q, 0.0), DTYPE).to(low.dtype)
    score = dot(above, tl.trans(high), score)
    return dot(below, tl.trans(low), score)


def top_pages(
    scores: Tensor, counts: Tensor, page_size: int, budget: int, first: int, last: int
) -> Tensor:
    """The `budget` best pages of each head `[B, Hs, budget]`; see `Ops.top_pages`."""
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
    size, fill = max(power_of_two(width), 128), power_of_two(budget)
    group = 1
    while size > 2 * fill * group * group:  # about as many groups as pages in the chosen ones
        group *= 2
    first_lanes, next_lanes = size // group, fill * group
    small = size <= _ONE_SEARCH or first_lanes + next_lanes > size // 2
    if max(first_lanes, next_lanes) > _MAX_BLOCK or (small and size <= _MAX_BLOCK):
        group = 1
    block = min(size // group, _MAX_BLOCK)
    lanes = block if group == 1 else max(first_lanes, next_lanes)
    chosen = out if group == 1 else out.new_empty(batch, heads, fill)
    _top_pages[batch, heads](
        scores, counts, chosen, out, width, row, counts.stride(),
        HEADS=heads, REPEAT=heads // counts.shape[1], PAGE=page_size, BUDGET=budget,
        FIRST=first, LAST=last, BLOCK=block, GROUP=group, PART=min(4, group, _MAX_BLOCK // block),
        WHOLE=width <= block * group, FILL=fill, OVERLAP=bool(options),
        num_warps=min(max(lanes // (32 * _THREAD), 4), 16), **options,
    )  # fmt: skip
    return out


@triton.jit
def _order(score):
    """Integers that rise with the scores; only a NaN has 0."""
    # Adding zero makes -0 and 0 equal, as they are as scores.
    bits = (score.to(tl.float32) + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _score(rank):
    """The finite score next to a rank."""
    rank = tl.minimum(tl.maximum(rank, 0x00800000), 0xFF7FFFFF)
    bits = tl.where(rank >> 31 == 1, rank ^ 0x80000000, ~rank)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rank(
    scores, n, low, held, sure, FIRST: tl.constexpr, SURE: tl.constexpr
):  # fmt: skip
    """Integers that rise with the precedence of pages n; 0 for those that may not be taken."""
    there = (n >= low) & (n < held)
    rank = _order(tl.load(scores + n, mask=there, other=0.0))  # [N]
    return _certain(rank, there, n < FIRST, n >= sure, SURE)


@triton.jit
def _certain(rank, there, first, last, TRAILING: tl.constexpr):
    """Ranks with the leading pages as high as any score, the trailing ones higher, 0 elsewhere."""
    rank = tl.where(first, 0xFF800000, rank)
    if TRAILING:
        rank = tl.where(last, 0xFFFFFFFF, rank)
    return tl.where(there, rank, 0)


@triton.jit
def _group_rank(
    scores, g, row, low, held, sure, FIRST: tl.constexpr, SURE: tl.constexpr, PARTIAL: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The highest rank among the pages of each group g."""
    best = tl.full(g.shape, float("-inf"), tl.float32)
    for part in tl.static_range(0, GROUP, PART):
        start = (g * GROUP + part)[:, None]
        c = tl.arange(0, PART)[None, :]
        # Whole parts are loaded, past the last page too, for loads of 128 bits.
        score = tl.load(scores + start + c, mask=(start < held) & (start + c < row))  # [N, PART]
        score = score.to(tl.float32)
        if PARTIAL or not SURE:  # else the group of the last page is certain
            score = tl.where((c < held - start) & (c >= low - start), score, float("-inf"))
        best = tl.maximum(best, tl.max(score, 1))
    start = g * GROUP
    there = (start + GROUP > low) & (start < held)
    trailing = start + GROUP > sure
    leading = tl.maximum(start, low) < FIRST
    return _certain(_order(best), there, leading, trailing, SURE)


@triton.jit
def _border(rank, wanted, enough):
    """The lowest rank taken, how many of that rank may be, and how many are taken in all.

    Taken are the `wanted` best, or more, up to `enough`, where the search ends sooner. Each step
    counts the ranks from two places on: where the counts at both ends suggest the border, which
    takes few steps where scores are spread smoothly, and halfway, which takes at most 32.
    """
    # Two counts at once: 16 bits hold those of a block.
    both = tl.sum((rank > 0).to(tl.int32) + ((rank >= 0xFF800000).to(tl.int32) << 16), 0)
    infinite = both >> 16
    # Certain pages have ranks of their own: the border is among them or among the others.
    among = infinite >= wanted
    least = tl.where(among, 0xFF800000, tl.min(tl.where(rank > 0, rank, 0xFFFFFFFF), 0))
    most = tl.where(among, 0xFFFFFFFF, tl.max(tl.where(rank < 0xFF800000, rank, 0), 0))
    # As many reach `least`, at least those wanted, and exceed `most`, fewer than wanted.
    reach = tl.where(among, infinite, both & 0xFFFF)
    exceed = tl.where(among, 0, infinite)
    aim = 0.5 * (_log(wanted) + _log(enough))
    while (least < most) & (reach > enough):
        start = _log(reach)
        share = (start - aim) / (start - _log(exceed))
        guess = _order(_score(least) * (1.0 - share) + _score(most) * share)
        guess = tl.minimum(tl.maximum(guess, least + 1), most)
        middle = least + ((most - least) >> 1) + ((most - least) & 1)
        lower = tl.minimum(guess, middle)
        upper = tl.maximum(guess, middle)
        both = tl.sum((rank >= lower).to(tl.int32) + ((rank >= upper).to(tl.int32) << 16), 0)
        more = both & 0xFFFF
        fewer = both >> 16
        most = tl.where(more < wanted, lower - 1, tl.where(fewer < wanted, upper - 1, most))
        exceed = tl.where(more < wanted, more, tl.where(fewer < wanted, fewer, exceed))
        least = tl.where(fewer >= wanted, upper, tl.where(more >= wanted, lower, least))
        reach = tl.where(fewer >= wanted, fewer, tl.where(more >= wanted, more, reach))
    all = reach <= enough
    return least, tl.where(all, reach, wanted - exceed), tl.where(all, reach, wanted)


@triton.jit
def _log(count):
    """Logarithm of a count, which may be 0."""
    return tl.log2(count.to(tl.float32) + 0.5)


@triton.jit
def _top_pages(
    scores, counts, chosen, out, width, row, counts_strides,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, PAGE: tl.constexpr, BUDGET: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, WHOLE: tl.constexpr, FILL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The best pages of one head: by one search, by groups first, or over several blocks."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    tokens = tl.load(counts + b * counts_strides[0] + h // REPEAT)
    held = tl.minimum((tokens + PAGE - 1) // PAGE, width)
    # Pages from `sure` on are taken for certain.
    PARTIAL: tl.constexpr = LAST < 0
    SURE: tl.constexpr = (LAST < 0 or LAST > 0) and LAST < BUDGET
    sure = tokens // PAGE if PARTIAL else held - LAST
    scores += (b * HEADS + h) * row
    out += (b * HEADS + h) * BUDGET
    low = held * 0
    if LAST >= BUDGET:
        low = tl.maximum(held - LAST, 0)  # only trailing pages have a chance
    wanted = tl.minimum(held - low, BUDGET)
    n = tl.arange(0, BLOCK)
    await_before(OVERLAP)

    if WHOLE:
        if GROUP > 1:
            some = tl.minimum(tl.cdiv(held, GROUP) - low // GROUP, BUDGET)
            rank = _group_rank(scores, n, row, low, held, sure, FIRST, SURE, PARTIAL, GROUP, PART)
            border, left, some = _border(rank, some, some * 0 + FILL)
            chosen += (b * HEADS + h) * FILL
            _write(chosen, rank, n, border, held * 0, held * 0, left)
            tl.debug_barrier()  # what other threads have written is read
            i = tl.arange(0, FILL * GROUP)
            # Groups that are not there start past all pages.
            n = tl.load(chosen + i // GROUP, mask=i // GROUP < some, other=width) * GROUP  # [N]
            n += i % GROUP
            rank = _rank(scores, n, low, held, sure, FIRST, SURE)
            # The best of so many groups: as many pages reach their border.
            rank = tl.where((some < BUDGET) | (rank >= border), rank, 0)
        else:
            rank = _rank(scores, n, low, held, sure, FIRST, SURE)
        border, left, wanted = _border(rank, wanted, wanted)  # fewer than wanted only with NaN
        _write(out, rank, n, border, held * 0, held * 0, left)
    else:
        # The border is the highest rank that `wanted` pages reach: bisected, and found when a rank
        # is reached by just as many.
        least = (held * 0).to(tl.uint32)
        most = least + 0xFFFFFFFF
        while least < most:
            middle = least + ((most - least) >> 1) + ((most - least) & 1)
            reach = held * 0
            for start in range(0, held, BLOCK):
                rank = _rank(scores, start + n, low, held, sure, FIRST, SURE)
                reach += tl.sum((rank >= middle).to(tl.int32), 0)
            least = tl.where(reach >= wanted, middle, least)
            most = tl.where(reach > wanted, most, tl.where(reach == wanted, middle, middle - 1))
        reach = held * 0
        for start in range(0, held, BLOCK):
            rank = _rank(scores, start + n, low, held, sure, FIRST, SURE)
            reach += tl.sum((rank > most).to(tl.int32), 0)
        above = held * 0  # pages of a higher rank, and of this one, in the blocks before
        equal = held * 0
        for start in range(0, held, BLOCK):
            rank = _rank(scores, start + n, low, held, sure, FIRST, SURE)
            above, equal = _write(out, rank, start + n, most, above, equal, wanted - reach)
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
