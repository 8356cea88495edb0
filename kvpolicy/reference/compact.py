"""Reading tokens of heads from wherever they lie in pages."""

from __future__ import annotations

from torch import Tensor

from ..types import Pages


def read_tokens(pages: Pages, table: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Global tokens `source` `[B, Hkv, n]` int32 of each head: k, v `[B, Hkv, n, D]`, meta.

    `table` `[B, Hkv, M]` names the heads' pages. -1 reads as zeros.
    """
    size, dim = pages.k.shape[1:]
    token = source.clamp(min=0).long()
    slot = (table.gather(2, token // size).long() * size + token % size).flatten()
    none = source < 0
    k, v = (x.view(-1, dim).index_select(0, slot).view(*source.shape, dim) for x in pages[:2])
    meta = pages.meta.view(-1).index_select(0, slot).view(source.shape)
    return (
        k.masked_fill_(none[..., None], 0),
        v.masked_fill_(none[..., None], 0),
        meta.masked_fill_(none, 0),
    )
