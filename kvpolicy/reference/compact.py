"""Compaction: kept tokens move to new pages without gaps."""

from __future__ import annotations

from torch import Tensor

from ..types import Pages


def move(pages: Pages, source: Tensor, target: Tensor, dest: Tensor) -> None:
    """Copies tokens between pages.

    Token n of head (b, h) lies in page `source[b, h, n // P]` and becomes token `dest[b, h, n]`
    (`[B, Hkv, N]` int32, -1: dropped) of the pages `target[b, h]`. `source`, `target` `[B, Hkv, M]`;
    no page is both source and target.
    """
    size = pages.k.shape[1]
    b, h, n = (dest >= 0).nonzero(as_tuple=True)
    index = dest[b, h, n].long()
    old = source[b, h, n // size].long() * size + n % size
    new = target[b, h, index // size].long() * size + index % size
    for store in (pages.k, pages.v):
        flat = store.view(-1, store.shape[2])
        flat.index_copy_(0, new, flat.index_select(0, old))
    meta = pages.meta.view(-1)
    meta.index_copy_(0, new, meta.index_select(0, old))
