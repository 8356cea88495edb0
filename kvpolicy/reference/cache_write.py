"""Writing tokens: into pages after a prompt call, into ring and pages for a decoded token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import ADMITTED, MARKED, POSITION_BITS, Pages


def append(
    pages: Pages,
    table: Tensor,
    key: Tensor,
    value: Tensor,
    meta: Tensor,
    dest: Tensor,
    rows: Tensor,
) -> None:
    """Stores tokens in pages that the table already names.

    `key`, `value` `[Hkv, T, D]`, `meta` `[Hkv, T]`; token t of head h becomes global token `dest[h, t]`
    (`[Hkv, T]` int32, -1: not stored) of sequence `rows[t]`. `table` `[B, Hkv, M]`.
    """
    size = pages.k.shape[1]
    head, token = (dest >= 0).nonzero(as_tuple=True)
    index = dest[head, token].long()
    page = table[rows[token].long(), head, index // size].long()
    slot = page * size + index % size
    pages.k.view(-1, pages.k.shape[2]).index_copy_(0, slot, key[head, token])
    pages.v.view(-1, pages.v.shape[2]).index_copy_(0, slot, value[head, token])
    pages.meta.view(-1).index_copy_(0, slot, meta[head, token])


def decode_write(
    pages: Pages,
    table: Tensor,
    counts: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_flags: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    lengths: Tensor,
    active: Tensor,
    window: int,
    minmax: bool = False,
) -> None:
    """Writes one decoded token a sequence; the token that leaves the window is promoted if admitted.

    `key`, `value` `[B, Hkv, D]` and `flags` `[B, Hkv]` uint8 go to ring slot `lengths % slots`; ring
    tensors are `[B, Hkv, slots, D]` and `[B, Hkv, slots]`. `lengths` `[B]` counts the tokens before
    this one. Rows that are not `active` `[B]` write nothing. A full last page makes its head take
    one from the free stack. `minmax` extends the page's summary (minimum and maximum key).
    """
    batch, heads, slots, dim = ring_k.shape
    size = pages.k.shape[1]
    row = torch.arange(batch, device=ring_k.device)
    leaving = lengths - window
    out = leaving.clamp(min=0) % slots
    out_flags = ring_flags[row, :, out]
    promote = ((out_flags & ADMITTED) > 0) & (active & (leaving >= 0))[:, None]
    b, h = promote.nonzero(as_tuple=True)
    if b.numel():
        count = counts[b, h].long()
        fresh = (count % size == 0).nonzero().squeeze(1)
        if fresh.numel():
            take_pages(pages, table, b[fresh], h[fresh], count[fresh] // size)
        page = table[b, h, count // size].long()
        slot = page * size + count % size
        promoted = ring_k[b, h, out[b]]
        pages.k.view(-1, dim)[slot] = promoted
        pages.v.view(-1, dim)[slot] = ring_v[b, h, out[b]]
        mark = ((out_flags[b, h] & MARKED) > 0).int() << POSITION_BITS
        pages.meta.view(-1)[slot] = leaving[b].int() | mark
        counts[b, h] += 1
        if minmax:
            assert pages.summary is not None
            extent = pages.summary[page].view(-1, 2, dim)
            first = (count % size == 0)[:, None]
            low = torch.where(first, promoted, torch.minimum(extent[:, 0], promoted))
            high = torch.where(first, promoted, torch.maximum(extent[:, 1], promoted))
            pages.summary[page] = torch.cat([low, high], -1)
    if not bool(active.all()):
        row, key, value, flags = row[active], key[active], value[active], flags[active]
    slot = (lengths % slots)[row]
    ring_k[row, :, slot] = key
    ring_v[row, :, slot] = value
    ring_flags[row, :, slot] = flags


def take_pages(pages: Pages, table: Tensor, b: Tensor, h: Tensor, index: Tensor) -> None:
    """Takes a page from the free stack for each `table[b, h, index]` and clears it.

    Clearing keeps unused slots finite: masked weights are exactly 0 and 0 x NaN is NaN.
    """
    top = int(pages.top) - b.numel()
    if top < 0:
        raise RuntimeError("the free stack is empty: capacity must be reserved before decoding")
    ids = pages.free[top : top + b.numel()].long()
    table[b, h, index] = ids.int()
    pages.top.fill_(top)
    pages.refs[ids] = 1
    pages.k[ids] = 0
    pages.v[ids] = 0
