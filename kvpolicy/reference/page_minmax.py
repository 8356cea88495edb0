"""The smallest and largest key of pages, which page selections such as Quest's read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages, check_minmax

SCRATCH = 64 << 20  # bytes of keys that are read at once


def write_minmax(pages: Pages, heads: Heads, before: Tensor, most: int) -> None:
    """Summarizes the pages with tokens from `before` `[B, Hkv]` on: `Ops.write_minmax`."""
    check_minmax("write_minmax", pages)
    assert pages.summary is not None
    (table, counts), size = heads, pages.k.shape[1]
    step = max(SCRATCH // (pages.k[0].nbytes * max(counts.numel(), 1)), 1)
    for some in torch.arange(most, device=counts.device).split(step):
        column = (before // size)[..., None] + some
        held = counts[..., None] - column * size
        place = ((held > 0) & (before < counts)[..., None]).nonzero(as_tuple=True)
        ids = table[place[0], place[1], column[place].long()].long()
        keys = pages.k.index_select(0, ids)
        beyond = torch.arange(size, device=ids.device) >= held[place][:, None]
        low = keys.masked_fill(beyond[..., None], float("inf")).amin(1)
        high = keys.masked_fill(beyond[..., None], float("-inf")).amax(1)
        named = ids > 0
        found = torch.cat([low, high], -1).to(pages.summary.dtype)
        pages.summary.index_copy_(0, ids[named], found[named])
