"""Log-sum-exps of rows from those of parts of the keys, added in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv
from ._softmax import LOG2E, level_of, weigh

_LOG2E = tl.constexpr(LOG2E)
_PARTS = 16  # partial sums that are added at once
_ROWS = 128


def add_levels(part: Tensor, sinks: Tensor | None, heads: int, queries: int) -> Tensor:
    """Levels to base 2 `[U, rows]` from those of parts `[U, parts, rows]`.

    Row r is query r % `queries` of its unit's head r // `queries`, unit u KV head u % `heads`;
    `sinks` `[Hq]` join. +inf, so that weights are 0, where nothing was seen.
    """
    units, parts, rows = part.shape
    found = torch.empty(units, rows, dtype=torch.float32, device=part.device)
    _add_levels[cdiv(rows, _ROWS), units](
        part, found, parts, rows, queries, None if sinks is None else sinks.contiguous(),
        HEADS=heads, PARTS=_PARTS, BLOCK=_ROWS, num_warps=4,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["parts", "rows", "queries"])
def _add_levels(
    part, found, parts, rows, queries, sinks, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a block of rows over all parts and the sink."""
    unit = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PARTS)
    part += unit * parts * rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        mask = (start + p < parts)[:, None] & (r < rows)[None, :]
        at = part + (start + p)[:, None] * rows + r[None, :]
        level = tl.load(at, mask=mask, other=float("-inf"))  # [PARTS, M]
        _, _, top, total = weigh(level, 1.0, top, total, 0, True)
    level = level_of(top, total)
    if sinks is not None:
        head = unit % HEADS * (rows // queries) + r // queries
        sink = tl.load(sinks + head, mask=r < rows, other=0.0).to(tl.float32) * _LOG2E  # [M]
        _, _, top, total = weigh(sink[None, :], 1.0, top, total, 0, True)
        level = tl.where(level > float("-inf"), level_of(top, total), level)
    level = tl.where(level > float("-inf"), level, float("inf"))
    tl.store(found + unit * rows + r, level, mask=r < rows)
