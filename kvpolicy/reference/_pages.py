"""Pages while tokens are written: taking some, and the minima and maxima of their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pages


def take_pages(pages: Pages, table: Tensor, *place: Tensor) -> None:
    """Takes a page from the free stack for each entry `table[place]` and clears it.

    The first gets the topmost. Clearing keeps unused slots finite: masked weights are exactly 0 and
    0 x NaN is NaN.
    """
    count = place[0].numel()
    top = int(pages.top) - count
    if top < 0:
        raise RuntimeError("the free stack is empty: capacity must be reserved before writing")
    ids = pages.free[top : top + count].flip(0).long()
    table[place] = ids.int()
    pages.top.fill_(top)
    pages.refs[ids] = 1
    pages.k[ids] = 0
    pages.v[ids] = 0


def extend_minmax(pages: Pages, page: Tensor, offset: Tensor, key: Tensor) -> None:
    """Extends the minima and maxima of pages `[n]` by keys `[n, D]` that went to slots `offset`."""
    assert pages.summary is not None
    extent = pages.summary[page].view(-1, 2, key.shape[1])
    first = (offset == 0)[:, None]
    low = torch.where(first, key, torch.minimum(extent[:, 0], key))
    high = torch.where(first, key, torch.maximum(extent[:, 1], key))
    pages.summary[page] = torch.cat([low, high], -1)
