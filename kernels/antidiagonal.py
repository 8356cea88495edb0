"""XAttention's choice of blocks: antidiagonal products, masses of blocks, the heaviest of them.

The products of groups of queries and groups of keys are one product of `stride` x D channels, of
which only the log-sum-exps over the groups of a block are kept. A tile's masses come from those,
as integers: sums of integers do not depend on their order, so a choice does not depend on how wide
the call is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Segments, tile_spans
from ._launch import (
    cdiv,
    check_dims,
    check_dtype,
    dense_last,
    dot_size,
    on,
    power_of_two,
    shared_memory,
)
from ._math import dot
from ._softmax import capped, factors, weigh

_SCRATCH = 256 << 20  # bytes of log-sum-exps at a time
_TOGETHER = 8  # tiles of queries whose programs run beside each other, to share keys
_PART = 4096  # log-sum-exps that a program of the second pass looks at in one step
_MOST_GROUPS = 256  # of a tile
_BITS = 30  # a tile's mass is 1 << 30
_WHOLE = tl.constexpr(float(1 << _BITS))
_STEPS = tl.constexpr(_BITS + 1)


class Tile(NamedTuple):
    """Groups of queries and of keys in a product, channels of a step, warps, stages, registers."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int
    registers: int | None = None


def choose_tile(dim: int, itemsize: int, shared: int) -> Tile:
    """The tile for a padded head_dim; two programs run beside each other."""
    if itemsize == 4:
        return Tile(64, 64, 32, 4, 2)
    wide = min(dim, 64)
    return Tile(128, 128, wide, 4, 3 if shared >= 160 << 10 else 2)


def antidiagonal_blocks(
    query: Tensor,
    keys: Tensor,
    present: Tensor,
    segments: Segments,
    scale: float,
    tile: int,
    stride: int,
    threshold: float,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Blocks `[Hq, N, M]` that tiles read; see `Ops.antidiagonal_blocks`."""
    check_dtype("antidiagonal_blocks", "query", query)
    check_dims("antidiagonal_blocks", query.shape[2])
    if tile // stride > _MOST_GROUPS:
        raise ValueError(
            f"antidiagonal_blocks: stride: wanted at least {tile // _MOST_GROUPS} for a tile of "
            f"{tile}, got {stride} (backend='reference' takes any)"
        )
    heads, spans = query.shape[0], tile_spans(segments, tile)
    tiles, most = sum(b - a for a, b in spans), max((b for _, b in spans), default=0)
    blocks = torch.zeros(heads, tiles, most, dtype=torch.bool, device=query.device)
    query = dense_last(query)
    # [Hkv, groups]
    held = present.view(keys.shape[0], -1, stride).sum(-1, dtype=torch.int32)
    limit = torch.full((), threshold, dtype=torch.float64, device=query.device)
    given = query, keys, held, scale, tile, stride, limit, threshold >= 1, softcap
    base = first = 0
    for row, (low, high) in enumerate(spans):
        size = max(_SCRATCH // (4 * heads * max(high, 1) * (tile // stride)), 1)
        for begin in range(low, high, size):
            end = min(begin + size, high)
            own = blocks[:, first + begin - low : first + end - low]
            at = segments.cu_q[row] - segments.start[row]  # the row of position 0
            edges = segments.start[row], segments.start[row] + segments.cu_q[row + 1]
            edges = edges[0], edges[1] - segments.cu_q[row]
            _span(own, *given, base, at, edges, begin, end)
        base += high * tile
        first += high - low
    return blocks


def _span(
    blocks: Tensor, query: Tensor, keys: Tensor, held: Tensor, scale: float, tile: int,
    stride: int, limit: Tensor, every: bool, softcap: float | None, base: int, at: int,
    edges: tuple[int, int], begin: int, end: int,
) -> None:  # fmt: skip
    """Marks `blocks` `[Hq, end - begin, M]` of tiles from `begin` on.

    Keys start at row `base`, position p has query `at + p`, and queries lie within `edges`.
    """
    heads, _, dim = query.shape
    kv_heads, total, _ = keys.shape
    groups = tile // stride
    shape = choose_tile(dot_size(dim), query.element_size(), shared_memory(query.device))
    rows, columns = shape.rows, max(shape.columns, groups)
    low, high = begin * groups // rows, cdiv(end * groups, rows)
    wide = cdiv(end * groups, columns)
    many = (end - begin) * groups
    levels = torch.empty(heads, many, end, dtype=torch.float32, device=query.device)
    amounts = torch.empty(heads, end - begin, end, dtype=torch.int32, device=query.device)
    scale, cap = factors(scale, softcap)
    pad = dot_size(dim)
    with on(query):
        _levels[wide * _TOGETHER, cdiv(high - low, _TOGETHER), heads](
            query, keys, held, levels, scale, cap, base, at, *edges, low, begin * groups,
            end * groups, end, total, query.stride(),
            GROUP=heads // kv_heads, STRIDE=stride, GROUPS=groups, DIM=dim,
            CHANNELS=min(shape.channels, pad), PARTS=cdiv(pad, min(shape.channels, pad)),
            ROWS=rows, COLUMNS=columns, TOGETHER=_TOGETHER, STAGES=shape.stages,
            num_warps=shape.warps, **({"maxnreg": shape.registers} if shape.registers else {}),
        )  # fmt: skip
        _amounts[end - begin, heads](
            levels, amounts, begin, *edges, end, many,
            STRIDE=stride, GROUPS=groups, PART=max(_PART // groups, 16), num_warps=4,
        )  # fmt: skip
        _heaviest[end - begin, heads](
            amounts, blocks, begin, end, limit, blocks.stride(),
            ALL=every, WIDTH=power_of_two(end), num_warps=8 if end > 2048 else 4,
        )  # fmt: skip


@triton.jit
def _levels(
    query, keys, held, levels, scale, cap, base, at, start, stop, low, first, last, blocks, total,
    query_strides,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps over each block of the logits of a tile of groups of queries and of keys."""
    head = tl.program_id(2).to(tl.int64)
    pid = tl.program_id(0)
    above = low + tl.program_id(1) * TOGETHER + pid % TOGETHER
    left = pid // TOGETHER * COLUMNS
    m = above * ROWS + tl.arange(0, ROWS)  # groups of queries, from the sequence's first
    n = left + tl.arange(0, COLUMNS)
    if (left > above * ROWS + ROWS - 1) | (above * ROWS >= last):
        return
    kv_head = head // GROUP
    c = tl.arange(0, CHANNELS)
    inside = n < last
    query += head * query_strides[0]
    keys += (kv_head * total + base) * DIM
    own = tl.where(inside, n, 0).to(tl.int64) * STRIDE
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, STRIDE * PARTS, num_stages=STAGES):
        nth = step // PARTS
        d = step % PARTS * CHANNELS + c
        i = m * STRIDE + STRIDE - 1 - nth  # positions
        there = (i >= start) & (i < stop)
        row = tl.where(there, at + i, 0).to(tl.int64)
        of = query + row[:, None] * query_strides[1] + d[None, :]
        of_k = keys + (own + nth)[:, None] * DIM + d[None, :]
        if PARTS * CHANNELS == DIM:
            q = tl.load(of, mask=there[:, None], other=0.0)  # [M, C]
            k = tl.load(of_k)  # [N, C]
        else:
            q = tl.load(of, mask=there[:, None] & (d < DIM)[None, :], other=0.0)
            k = tl.load(of_k, mask=(d < DIM)[None, :], other=0.0)
        acc = dot(q, tl.trans(k), acc)
    count = tl.load(held + kv_head * (total // STRIDE) + base // STRIDE + n, mask=inside, other=0)
    size = tl.maximum(count, 1).to(tl.float32)
    logits = acc / size[None, :]
    if cap is not None:
        logits = capped(logits, scale, cap, True)
    else:
        logits *= scale
    logits += tl.log2(size / STRIDE)[None, :]
    seen = (n[None, :] <= m[:, None]) & (count > 0)[None, :]
    logits = tl.where(seen, logits, float("-inf"))
    each = tl.reshape(logits, [ROWS, COLUMNS // GROUPS, GROUPS])
    top = tl.max(each, 2)  # [M, B]
    some = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.sum(tl.exp2(each - tl.expand_dims(some, 2)), 2)
    level = tl.where(weight > 0, some + tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))
    block = left // GROUPS + tl.arange(0, COLUMNS // GROUPS)
    to = levels + (head * (last - first) + m - first)[:, None] * blocks + block[None, :]
    mine = ((m >= first) & (m < last))[:, None] & (block < blocks)[None, :]
    tl.store(to, level, mask=mine)


@triton.jit
def _amounts(
    levels, amounts, begin, start, stop, blocks, rows,
    STRIDE: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Masses of a tile's blocks: each row's weights over all keys, summed over its rows."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, GROUPS)
    j = tl.arange(0, PART)
    at = ((begin + tile) * GROUPS + g) * STRIDE
    asks = (at + STRIDE > start) & (at < stop)
    of = levels + (head * rows + tile * GROUPS + g)[:, None] * blocks
    upto = begin + tile + 1
    top = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    for low in range(0, upto, PART):
        mask = asks[:, None] & (low + j < upto)[None, :]
        level = tl.load(of + low + j[None, :], mask=mask, other=float("-inf"))  # [G, P]
        _, _, top, total = weigh(level, 1.0, top, total, 1, True)
    some = total > 0
    whole = tl.where(some, top, 0.0) + tl.log2(tl.where(some, total, 1.0))
    count = tl.sum(asks.to(tl.int32), 0).to(tl.float32)
    amounts += (head * tl.num_programs(0) + tile) * blocks
    for low in range(0, upto, PART):
        mask = asks[:, None] & (low + j < upto)[None, :]
        level = tl.load(of + low + j[None, :], mask=mask, other=float("-inf"))
        mass = tl.sum(tl.exp2(level - whole[:, None]), 0) / count  # [P]
        amount = (mass * _WHOLE + 0.5).to(tl.int32)
        tl.store(amounts + low + j, amount, mask=low + j < upto)


@triton.jit
def _heaviest(
    amounts, blocks, begin, width, threshold, blocks_strides,
    ALL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Marks the first block, the tile's own and the heaviest that hold `threshold` of the mass."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    own = begin + tile
    j = tl.arange(0, WIDTH)
    amounts += (head * tl.num_programs(0) + tile) * width
    amount = tl.load(amounts + j, mask=j <= own, other=0)  # [W]
    sure = (j == 0) | (j == own)
    kept = sure
    if ALL:
        kept = j <= own
    else:
        total = tl.sum(amount.to(tl.int64), 0)
        needed = total.to(tl.float64) * tl.load(threshold)
        held = tl.sum(tl.where(sure, amount, 0).to(tl.int64), 0)
        other = tl.where(sure | (j > own), -1, amount)
        # The least amount of which all larger ones do not suffice.
        low = tl.full([], 0, tl.int32)
        high = low + (1 << 30)
        for _ in range(0, _STEPS):
            middle = (low + high) // 2
            above = held + tl.sum(tl.where(other > middle, amount, 0).to(tl.int64), 0)
            short = above.to(tl.float64) < needed
            high = tl.where(short, middle, high)
            low = tl.where(short, low, tl.minimum(middle + 1, high))
        above = held + tl.sum(tl.where(other > high, amount, 0).to(tl.int64), 0)
        ties = other == high
        before = tl.cumsum(ties.to(tl.int32), 0) - ties.to(tl.int32)
        upto = above + before.to(tl.int64) * high
        more = (other > high) | (ties & (upto.to(tl.float64) < needed))
        kept = sure | more
    to = blocks + head * blocks_strides[0] + tile * blocks_strides[1] + j
    tl.store(to, kept, mask=j < width)
