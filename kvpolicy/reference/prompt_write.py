"""Writing a prompt call's tokens: those admitted that have left the window when it ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import ADMITTED, POSITION_BITS, Pages, Segments
from .cache_write import append, take_pages


def count_leaving(
    flags: Tensor, counts: Tensor, segments: Segments, window: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How far heads grow: admitted tokens among the recent that are not in the window at the end.

    `flags` `[Hkv, Tk]` uint8 are those of the recent tokens, `counts` `[B, Hkv]` the global tokens
    so far. Returns the counts afterwards and the pages that each head takes for that, both `[B,
    Hkv]` int32, and a tensor for `write_leaving` of the same backend.
    """
    rows, at, ends = places(segments, flags.device)
    stored = ((flags & ADMITTED) > 0) & (at < ends - window)
    running = F.pad(stored.cumsum(1, dtype=torch.int32), (1, 0))
    base = running[:, segments.cu_k_dev.long()]  # [Hkv, B + 1]
    after = counts + (base[:, 1:] - base[:, :-1]).T
    index = counts.T[:, rows] + running[:, 1:] - 1 - base[:, rows]
    fresh = _pages(after, page_size) - _pages(counts, page_size)
    return after, fresh, torch.where(stored, index, -1)


def write_leaving(
    pages: Pages,
    table: Tensor,
    counts: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    segments: Segments,
    window: int,
    after: Tensor,
    fresh: Tensor,
    ranks: Tensor,
) -> None:
    """Stores what `count_leaving` counted, with the same flags, counts, segments and window.

    `key`, `value` `[Hkv, Tk, D]` are the recent tokens. `table` `[B, Hkv, M]` gets pages from the
    free stack, the topmost first, head after head and column after column; tokens are stored in the
    order of their positions. `counts` becomes `after`.
    """
    have = _pages(counts, pages.k.shape[1])
    column = torch.arange(table.shape[2], device=table.device)
    new = (column >= have[..., None]) & (column < (have + fresh)[..., None])
    take_pages(pages, table, *new.nonzero(as_tuple=True))
    rows, at, _ = places(segments, key.device)
    meta = at.int() | ((flags.int() >> 1) & 1) << POSITION_BITS
    append(pages, table, key, value, meta, ranks, rows.int())
    counts.copy_(after)


def places(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence, position and the sequence's new length of recent tokens, `[Tk]` int64 each."""
    cu = segments.cu_k_dev.long()
    rows = torch.repeat_interleave(
        torch.arange(len(segments.start), device=device),
        cu[1:] - cu[:-1],
        output_size=segments.cu_k[-1],
    )
    ends = segments.start_dev.long() + segments.cu_q_dev[1:].long() - segments.cu_q_dev[:-1].long()
    at = torch.arange(segments.cu_k[-1], device=device) - cu[1:][rows] + ends[rows]
    return rows, at, ends[rows]


def _pages(counts: Tensor, size: int) -> Tensor:
    return (counts + size - 1) // size
