"""XAttention's choice of blocks: antidiagonal products, masses of blocks, the heaviest of them.

The products of groups of queries and groups of keys are one product of `stride` x D channels, of
which only the log-sum-exps over the groups of a block are kept. A tile's masses come from those,
as integers: sums of integers do not depend on their order, so a choice does not depend on how wide
the call is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops import Segments, tile_spans
from ._launch import (
    cdiv,
    check_dims,
    check_dtype,
    dense_last,
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
    """Groups of queries and of keys in a product, channels of a step, warps, stages.

    With `descriptors` the device's copy engine loads both.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int
    descriptors: bool = False


def choose_tile(itemsize: int, shared: int) -> Tile:
    """The tile for an element size and the shared memory of a program."""
    if itemsize == 4:
        return Tile(64, 64, 32, 4, 2)
    if shared >= 200 << 10:
        return Tile(128, 256, 64, 8, 3, True)
    return Tile(128, 128, 64, 8, 3 if shared >= 128 << 10 else 2)


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
        each = 4 * (tile // stride) * high + tile * query.shape[2] * query.element_size()
        size = max(_SCRATCH // (heads * max(each, 1)), 1)
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
    groups, wide = tile // stride, stride * dim
    shape = choose_tile(query.element_size(), shared_memory(query.device))
    columns, many = max(shape.columns, groups), (end - begin) * groups
    folded = torch.empty(heads * many, wide, dtype=query.dtype, device=query.device)
    levels = torch.empty(heads, many, end, dtype=torch.float32, device=query.device)
    amounts = torch.empty(heads, end - begin, end, dtype=torch.int32, device=query.device)
    scale, cap = factors(scale, softcap)
    sides: tuple[Any, Any] = folded, keys.view(-1, wide)
    descriptors = shape.descriptors and wide * query.element_size() % 16 == 0
    if descriptors:
        sides = (
            TensorDescriptor.from_tensor(folded, [shape.rows, shape.channels]),
            TensorDescriptor.from_tensor(sides[1], [columns, shape.channels]),
        )
    with on(query):
        _fold_groups[cdiv(many * stride, 32), heads](
            query, folded, at, *edges, begin * tile, many, query.stride(),
            STRIDE=stride, DIM=dim, DIM_PAD=power_of_two(dim), BLOCK=32, num_warps=4,
        )  # fmt: skip
        over = cdiv(many, shape.rows * _TOGETHER)
        _levels[cdiv(end * groups, columns) * _TOGETHER, over, heads](
            *sides, held, levels, scale, cap, base // stride, begin * groups, end * groups, end,
            total // stride, heads * many,
            GROUP=heads // kv_heads, STRIDE=stride, GROUPS=groups, WIDE=wide,
            CHANNELS=shape.channels, ROWS=shape.rows, COLUMNS=columns, TOGETHER=_TOGETHER,
            DESCRIPTORS=descriptors, STAGES=shape.stages, num_warps=shape.warps,
        )  # fmt: skip
        _amounts[end - begin, heads](
            levels, amounts, begin, *edges, end, many,
            STRIDE=stride, GROUPS=groups, PART=max(_PART // groups, 16), num_warps=4,
        )  # fmt: skip
        _heaviest[end - begin, heads](
            amounts, blocks, begin, end, limit, *blocks.stride()[:2],
            ALL=every, WIDTH=power_of_two(end), num_warps=8 if end > 2048 else 4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["at", "start", "stop", "first", "many"])
def _fold_groups(
    query, folded, at, start, stop, first, many, query_strides,
    STRIDE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies queries to rows of their groups, a group's last one first; zeros where none is."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PAD)
    i = first + r // STRIDE * STRIDE + STRIDE - 1 - r % STRIDE  # positions
    there = (i >= start) & (i < stop)
    row = tl.where(there, at + i, 0).to(tl.int64)
    of = query + head * query_strides[0] + row[:, None] * query_strides[1] + d[None, :]
    q = tl.load(of, mask=there[:, None] & (d < DIM)[None, :], other=0.0)  # [R, D]
    to = folded + (head * many * STRIDE + r)[:, None] * DIM + d[None, :]
    tl.store(to, q, mask=(r < many * STRIDE)[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["base", "first", "last", "blocks", "total", "rows"])
def _levels(
    folded, keys, held, levels, scale, cap, base, first, last, blocks, total, rows,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps over each block of the logits of a tile of groups of queries and of keys."""
    head = tl.program_id(2).to(tl.int64)
    pid = tl.program_id(0)
    above = first + (tl.program_id(1) * TOGETHER + pid % TOGETHER) * ROWS
    left = pid // TOGETHER * COLUMNS
    if (left > above + ROWS - 1) | (above >= last):
        return
    m = above + tl.arange(0, ROWS)  # groups of queries, from the sequence's first
    n = left + tl.arange(0, COLUMNS)
    mine = head * (last - first) + above - first  # row of the first group of queries
    theirs = head // GROUP * total + base + left
    c = tl.arange(0, CHANNELS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, (WIDE + CHANNELS - 1) // CHANNELS, num_stages=STAGES):
        low = step * CHANNELS
        if DESCRIPTORS:
            q = folded.load([mine.to(tl.int32), low])  # [M, C]
            k = keys.load([theirs.to(tl.int32), low])  # [N, C]
        else:
            # Rows after the last are those of others, and left out below.
            of = tl.minimum(mine + tl.arange(0, ROWS), rows - 1)
            of_k = theirs + tl.minimum(tl.arange(0, COLUMNS), last - 1 - left)
            inside = (low + c < WIDE)[None, :]
            q = tl.load(folded + of[:, None] * WIDE + low + c[None, :], mask=inside, other=0.0)
            k = tl.load(keys + of_k[:, None] * WIDE + low + c[None, :], mask=inside, other=0.0)
        acc = dot(q, tl.trans(k), acc)
    count = tl.load(held + head // GROUP * total + base + n, mask=n < last, other=0)
    plain = (tl.min(count, 0) == STRIDE) & (left + COLUMNS <= above)
    if cap is None and plain:
        acc *= scale / STRIDE
    else:
        size = tl.maximum(count, 1).to(tl.float32)
        acc = acc / size[None, :]
        if cap is not None:
            acc = capped(acc, scale, cap, True)
        else:
            acc *= scale
        acc += tl.log2(size / STRIDE)[None, :]
        seen = (n[None, :] <= m[:, None]) & (count > 0)[None, :]
        acc = tl.where(seen, acc, float("-inf"))
    each = tl.reshape(acc, [ROWS, COLUMNS // GROUPS, GROUPS])
    top = tl.max(each, 2)  # [M, B]
    some = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.sum(tl.exp2(each - tl.expand_dims(some, 2)), 2)
    level = tl.where(weight > 0, some + tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))
    block = left // GROUPS + tl.arange(0, COLUMNS // GROUPS)
    to = levels + (mine + tl.arange(0, ROWS))[:, None] * blocks + block[None, :]
    tl.store(to, level, mask=(m < last)[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=["begin", "start", "stop", "blocks", "rows"])
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


@triton.jit(
    do_not_specialize=["begin", "width", "blocks_h", "blocks_n"],
    do_not_specialize_on_alignment=["blocks"],
)
def _heaviest(
    amounts, blocks, begin, width, threshold, blocks_h, blocks_n,
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
    to = blocks + head * blocks_h + tile * blocks_n + j
    tl.store(to, kept, mask=j < width)
