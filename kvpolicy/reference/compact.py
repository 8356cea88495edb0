"""Tokens of heads by number: reading them from wherever they lie, moving kept ones together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pages


def read_tokens(pages: Pages, table: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Global tokens `source` `[B, Hkv, n]` of each head: `Ops.read_tokens`."""
    size = pages.k.shape[1]
    token = source.clamp(min=0).long()
    slot = (table.gather(2, token // size).long() * size + token % size).flatten()
    none = source < 0
    k, v = (
        x.view(-1, x.shape[2]).index_select(0, slot).view(*source.shape, x.shape[2])
        for x in pages[:2]
    )
    meta = pages.meta.view(-1).index_select(0, slot).view(source.shape)
    return (
        k.masked_fill_(none[..., None], 0),
        v.masked_fill_(none[..., None], 0),
        meta.masked_fill_(none, 0),
    )


def move_kept(
    pages: Pages, old: Tensor, new: Tensor, keep: Tensor, starts: Tensor, lengths: Tensor
) -> None:
    """Moves the kept tokens of each head `[U]` to its front, in order: `Ops.move_kept`."""
    size = pages.k.shape[1]
    for head, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        token = keep[start : start + length].nonzero().squeeze(1)
        place = torch.arange(token.numel(), device=token.device)
        source = old[head, token // size].long() * size + token % size
        target = new[head, place // size].long() * size + place % size
        for store in (pages.k, pages.v, pages.meta):
            flat = store.flatten(0, 1)  # a view: pages are contiguous
            flat.index_copy_(0, target, flat.index_select(0, source))
