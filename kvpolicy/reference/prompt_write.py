"""Writing a prompt call's tokens: those admitted that have left the window when it ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import ADMITTED, POSITION_BITS, Heads, Pages, Segments
from ._pages import take_pages
from .cache_write import append


def count_leaving(
    flags: Tensor, before: Tensor, segments: Segments, window: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How far heads grow: `Ops.count_leaving`. Ranks `[Hkv, Tk]` are tokens' indices, or -1."""
    rows, at, ends = segments.places()
    stored = ((flags & ADMITTED) > 0) & (at < ends - window)
    running = F.pad(stored.cumsum(1, dtype=torch.int32), (1, 0))
    base = running[:, segments.cu_k_dev.long()]  # [Hkv, B + 1]
    after = before + (base[:, 1:] - base[:, :-1]).T
    index = before.T[:, rows] + running[:, 1:] - 1 - base[:, rows]
    fresh = _pages(after, page_size) - _pages(before, page_size)
    return after, fresh, torch.where(stored, index, -1)


def write_leaving(
    pages: Pages,
    heads: Heads,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    window: int,
    after: Tensor,
    fresh: Tensor,
    ranks: Tensor,
) -> None:
    """Stores what `count_leaving` counted: `Ops.write_leaving`."""
    table, counts = heads
    have = _pages(counts, pages.k.shape[1])
    column = torch.arange(table.shape[2], device=table.device)
    new = (column >= have[..., None]) & (column < (have + fresh)[..., None])
    take_pages(pages, table, *new.nonzero(as_tuple=True))
    rows, at, _ = segments.places()
    meta = at.int() | ((flags.int() >> 1) & 1) << POSITION_BITS
    append(pages, table, key, value, meta, ranks, rows.int())
    counts.copy_(after)


def _pages(counts: Tensor, size: int) -> Tensor:
    return (counts + size - 1) // size
