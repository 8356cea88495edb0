"""R-KV's scores straight from pages, without a product of all of a head's keys with all others.

Keys are copied once, over their norms and without gaps: the stored ones, then the window's. The sum
of all of a key's cosines is its product with the sum of the copies; what does not count to the mean
is one cosine for each key that resembles it. Logits of the last queries, of a group's heads
together, are held for their softmax; a last pass over the tokens makes scores of both. Sums over
keys are of integers, which add in any order, or in a fixed one: how wide the table is changes no
bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Heads, Pages, Ring, check_asked
from ._launch import cdiv, check_dims, check_dtype, dense_last, dot_size, on
from ._math import dot, narrow
from ._pages import KEYS, find, token_rows
from ._softmax import LOG2E, capped, factors, level_of, weigh
from .redundancy import find_last

_AT_ONCE = 1 << 18  # keys that are copied at once, of one head at least
_CHUNK = 4096  # numbers of a head that are added at once
_UNIT = tl.constexpr(1 << 40)  # sums are added in units of this part
_LOG2E = tl.constexpr(LOG2E)


def redundancy_scores(
    pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor, window: int,
    scale: float, *, observation: int, kernel: int, mix: float, threshold: float, group: str,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Scores `[B, Hkv, M * P]`; see `Ops.redundancy_scores`."""
    check_dtype("redundancy_scores", "queries", queries)
    check_asked("redundancy_scores", queries.shape[1], softcap, None)
    size, dim = pages.k.shape[1:]
    check_dims("redundancy_scores", dim)
    batch, kv_heads, columns = heads.table.shape
    units, width, device = batch * kv_heads, columns * size, pages.k.device
    out = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=device)
    if not out.numel():
        return out
    table, counts = dense_last(heads.table), heads.counts.contiguous()
    recent, queries = dense_last(ring.k), dense_last(queries)
    both, pad = width + window, dot_size(dim)
    step = min(max(_AT_ONCE // both, 1), units)
    copies = torch.empty(step, both, dim, dtype=pages.k.dtype, device=device)
    last = torch.empty(step, both, dtype=torch.int32, device=device)
    there = torch.empty(step, dtype=torch.int32, device=device)
    every = torch.empty(step, both, dtype=torch.float32, device=device)
    logits = torch.empty(step, observation, width, dtype=torch.float32, device=device)
    levels = torch.empty(step, observation + 1, dtype=torch.float32, device=device)
    block = 64 if pad <= 128 else 32 if pad <= 256 else 16
    tile = 16 if queries.element_size() == 4 and pad > 256 else block
    stored = {
        "SLAB_PAGES": pages.slab_pages, "PAGE": size, "KV_HEADS": kv_heads, "DIM": dim,
        "DIM_PAD": pad,
    }  # fmt: skip
    observed = {"OBSERVED": observation, "QUERIES": min(dot_size(observation), 64)}
    with on(pages.k):
        for first in range(0, units, step):
            many = min(step, units - first)
            sums = torch.zeros(many, both + dim, dtype=torch.int64, device=device)
            _copy[cdiv(both, block), many](
                pages.k, pages.slabs, table, counts, recent, lengths, copies, last, there, sums,
                first, both, window, table.stride(), recent.stride(), **stored,
                SLOTS=recent.shape[2], BLOCK=block, num_warps=4,
            )  # fmt: skip
            find_last(copies[:many], there, last, threshold)
            _add_cosines[cdiv(both, block), many](
                copies, there, last, sums, every, both, DIM=dim, DIM_PAD=pad, BLOCK=block,
                num_warps=4,
            )  # fmt: skip
            _group_logits[cdiv(width, tile), many, cdiv(observation, observed["QUERIES"])](
                pages.k, pages.slabs, table, counts, queries, lengths, logits, first, width,
                *factors(scale, softcap), table.stride(), queries.stride(), **stored, **observed,
                GROUP=queries.shape[1] // kv_heads, QUERY_SLOTS=queries.shape[2],
                MEAN=group == "mean", BLOCK=tile, num_warps=4,
            )  # fmt: skip
            _levels[observation + 1, many](
                logits, every, sums, there, counts, levels, first, width, both,
                OBSERVED=observation, DIM=dim, BLOCK=_CHUNK, num_warps=8,
            )  # fmt: skip
            _mix[cdiv(width, 128), many](
                logits, every, sums, there, counts, lengths, levels, out, first, width, both,
                float(mix), **observed, KV_HEADS=kv_heads, DIM=dim, KERNEL=kernel, BLOCK=128,
                num_warps=4,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first"])
def _copy(
    pages_k, slabs, table, counts, recent, lengths, copies, last, there, sums, first, both, window,
    table_strides, recent_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a head's keys over their norms, zeros after the last; adds them to the sum."""
    own = tl.program_id(1).to(tl.int64)
    unit = first + own
    b, head = unit // KV_HEADS, unit % KV_HEADS
    count = tl.load(counts + unit).to(tl.int32)
    length = tl.load(lengths + b).to(tl.int32)
    near = tl.minimum(length, window)
    if tl.program_id(0) == 0:
        tl.store(there + own, count + near)
    n, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    to = copies + own * both * DIM + n[:, None].to(tl.int64) * DIM + d[None, :]
    real = (n < both)[:, None] & (d < DIM)[None, :]
    tl.store(last + own * both + n, tl.full([BLOCK], -1, tl.int32), mask=n < both)
    if tl.program_id(0) * BLOCK >= count + near:
        tl.store(to, tl.zeros([BLOCK, DIM_PAD], copies.dtype.element_ty), mask=real)
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
    tl.store(to, k, mask=real)
    total = (tl.sum(k.to(tl.float32), 0).to(tl.float64) * _UNIT).to(tl.int64)
    tl.atomic_add(sums + own * (both + DIM) + both + d, total, mask=d < DIM, sem="relaxed")


@triton.jit
def _add_cosines(
    copies, there, last, sums, every, both,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the cosines of a block of keys, and the one of each that does not count elsewhere."""
    own = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    held = n < tl.load(there + own)
    copies += own * both * DIM
    sums += own * (both + DIM)
    mask = held[:, None] & (d < DIM)[None, :]
    k = tl.load(copies + n[:, None].to(tl.int64) * DIM + d[None, :], mask=mask, other=0.0)
    k = k.to(tl.float32)  # [N, D]
    total = tl.load(sums + both + d, mask=d < DIM, other=0).to(tl.float64) / _UNIT
    found = tl.sum(k * total.to(tl.float32)[None, :], 1) - tl.sum(k * k, 1)
    tl.store(every + own * both + n, found, mask=held)
    # As the original has it: the first where none resembles.
    to = tl.maximum(tl.load(last + own * both + n, mask=held, other=0), 0)
    from_to = copies + to[:, None].to(tl.int64) * DIM + d[None, :]
    one = tl.load(from_to, mask=mask, other=0.0).to(tl.float32)
    kept = (tl.sum(k * one, 1).to(tl.float64) * _UNIT).to(tl.int64)
    tl.atomic_add(sums + to, kept, mask=held & (to != n), sem="relaxed")


@triton.jit(do_not_specialize=["first"])
def _group_logits(
    pages_k, slabs, table, counts, queries, lengths, logits, first, width, scale, cap,
    table_strides, query_strides,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, OBSERVED: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr,
    QUERY_SLOTS: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of some of the last queries and a block of keys, over a group's heads."""
    own = tl.program_id(1).to(tl.int64)
    unit = first + own
    b, head = unit // KV_HEADS, unit % KV_HEADS
    count = tl.load(counts + unit)
    if tl.program_id(0) * BLOCK >= count:
        return
    n, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    stored = n < count
    page, slot = find(table + b * table_strides[0] + head * table_strides[1], n, stored, PAGE)
    from_k = token_rows(pages_k, slabs, page, slot, d, KEYS, SLAB_PAGES, PAGE, DIM)
    k = tl.load(from_k, mask=stored[:, None] & (d < DIM)[None, :], other=0.0)  # [N, D]
    w = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    at = tl.load(lengths + b).to(tl.int32) - OBSERVED + w
    there = (w < OBSERVED) & (at >= 0)
    slot = (tl.where(there, at, 0) % QUERY_SLOTS).to(tl.int64)
    queries += b * query_strides[0] + head * GROUP * query_strides[1]
    from_q = queries + slot[:, None] * query_strides[2] + d[None, :]
    mask = there[:, None] & (d < DIM)[None, :]
    start = 0.0 if MEAN else float("-inf")
    found = tl.full([BLOCK, QUERIES], start, tl.float32)
    for g in range(GROUP):
        q = tl.load(from_q + g * query_strides[1], mask=mask, other=0.0)  # [w, D]
        one = dot(k, tl.trans(q), tl.zeros([BLOCK, QUERIES], tl.float32))
        one = capped(one, scale, cap, q.dtype == tl.float32) if cap is not None else one * scale
        found = found + one / GROUP if MEAN else tl.maximum(found, one)
    to = logits + (own * OBSERVED + w[None, :]) * width + n[:, None]
    tl.store(to, found, mask=stored[:, None] & (w < OBSERVED)[None, :])


@triton.jit
def _mean_cosine(every, sums, own, n, held, both, total, DIM: tl.constexpr):
    """Means of cosines of keys n, times log2(e)."""
    found = tl.load(every + own * both + n, mask=held, other=0.0)
    less = tl.load(sums + own * (both + DIM) + n, mask=held, other=0).to(tl.float64) / _UNIT
    return (found - less.to(tl.float32)) / total * _LOG2E


@triton.jit(do_not_specialize=["first"])
def _levels(
    logits, every, sums, there, counts, levels, first, width, both,
    OBSERVED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp to base 2 of a query's logits, or of the means of a head's cosines."""
    row, own = tl.program_id(0), tl.program_id(1).to(tl.int64)
    all_ = tl.load(there + own)
    count = tl.load(counts + first + own).to(tl.int32)
    many = tl.where(row < OBSERVED, count, all_)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for low in range(0, many, BLOCK):
        n = low + tl.arange(0, BLOCK)
        held = n < many
        if row < OBSERVED:
            x = tl.load(logits + (own * OBSERVED + row) * width + n, mask=held, other=0.0)
        else:
            x = _mean_cosine(every, sums, own, n, held, both, all_.to(tl.float32), DIM)
        x = tl.where(held, x, float("-inf"))
        _, _, top, total = weigh(x[None, :], 1.0, top, total, 1, True)
    tl.store(levels + own * (OBSERVED + 1) + row + tl.arange(0, 1), level_of(top, total))


@triton.jit(do_not_specialize=["first"])
def _mix(
    logits, every, sums, there, counts, lengths, levels, out, first, width, both, mix,
    OBSERVED: tl.constexpr, QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    KERNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores of a block of tokens."""
    own = tl.program_id(1).to(tl.int64)
    unit = first + own
    count = tl.load(counts + unit)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= count:
        tl.store(out + unit * width + n, tl.zeros([BLOCK], tl.float32), mask=n < width)
        return
    length = tl.load(lengths + unit // KV_HEADS).to(tl.int32)
    levels += own * (OBSERVED + 1)
    seen = tl.zeros([BLOCK], tl.float32)
    for place in range(KERNEL):
        m = n + place - KERNEL // 2
        real = (m >= 0) & (m < count)
        mass = tl.zeros([BLOCK], tl.float32)
        for first_w in range(0, OBSERVED, QUERIES):
            w = first_w + tl.arange(0, QUERIES)
            ok = (w < OBSERVED) & (length - OBSERVED + w >= 0)
            level = tl.load(levels + w, mask=ok, other=0.0)[:, None]
            from_ = logits + (own * OBSERVED + w[:, None]) * width + m[None, :]
            x = tl.load(from_, mask=ok[:, None] & real[None, :], other=float("-inf"))  # [w, N]
            mass += tl.sum(tl.exp2(x - level), 0)
        seen = tl.maximum(seen, mass)
    seen /= tl.minimum(tl.maximum(length, 1), OBSERVED)
    held = n < count
    mean = _mean_cosine(every, sums, own, n, held, both, tl.load(there + own).to(tl.float32), DIM)
    alike = tl.exp2(mean - tl.load(levels + OBSERVED))
    score = seen * mix - alike * (1 - mix)
    tl.store(out + unit * width + n, tl.where(held, score, 0.0), mask=n < width)
