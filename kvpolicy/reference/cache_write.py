"""Writing tokens: into pages after a prompt call, into ring and pages for a decoded token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, MARKED, POSITION_BITS, Heads, Pages, Ring, ring_slot


def append(
    pages: Pages,
    table: Tensor,
    key: Tensor,
    value: Tensor,
    meta: Tensor,
    dest: Tensor,
    rows: Tensor,
) -> None:
    """Stores tokens in pages that the table already names: `Ops.append`."""
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
    heads: Heads,
    ring: Ring,
    key: Tensor,
    value: Tensor,
    flags: Tensor | None,
    lengths: Tensor,
    active: Tensor,
    window: int,
    *,
    minmax: bool = False,
    bits: int = 0,
    query: Tensor | None = None,
    queries: Tensor | None = None,
) -> None:
    """Writes one decoded token a sequence and promotes the one that leaves: `Ops.decode_write`."""
    # Plain ints and rows: tensors of one token are all dispatch.
    for row, (length, on) in enumerate(zip(lengths.tolist(), active.tolist(), strict=True)):
        if not on:
            continue
        k, v, f = (x.select(0, row) for x in ring)
        if length >= window:
            out = ring.slot(length - window)
            leaving = k.select(1, out), v.select(1, out), f.select(1, out)
            own = Heads(heads.table.select(0, row), heads.counts.select(0, row))
            _promote(pages, own, *leaving, length - window, minmax)
        slot = ring.slot(length)
        k.select(1, slot).copy_(key.select(0, row))
        v.select(1, slot).copy_(value.select(0, row))
        if flags is None:
            f.select(1, slot).fill_(bits)
        else:
            f.select(1, slot).copy_(flags[row] | bits)
        if query is not None and queries is not None:
            queries[row].select(1, ring_slot(length, queries.shape[2])).copy_(query[row])


def _promote(
    pages: Pages,
    own: Heads,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    position: int,
    minmax: bool,
) -> None:
    """Appends a sequence's leaving token to the pages of the heads that admitted it.

    `own` are the sequence's: table `[Hkv, M]` and counts `[Hkv]`.
    """
    size, dim = pages.k.shape[1:]
    table, counts = own
    bits, held = flags.tolist(), counts.tolist()
    h = [head for head, bit in enumerate(bits) if bit & ADMITTED]
    if not h:
        return
    full = [head for head in h if held[head] % size == 0]
    if full:
        fresh = torch.tensor([full, [held[head] // size for head in full]], device=key.device)
        take_pages(pages, table, fresh[0], fresh[1])
    columns, offsets = [held[head] // size for head in h], [held[head] % size for head in h]
    meta = [position | ((bits[head] & MARKED) > 0) << POSITION_BITS for head in h]
    if len(h) == len(bits) and held == held[:1] * len(h):  # even heads: a slot of a page each
        page = table.select(1, columns[0]).long()
        for store, new in ((pages.k, key), (pages.v, value)):
            store.select(1, offsets[0]).index_copy_(0, page, new)
        into = pages.meta.select(1, offsets[0])
        if meta == meta[:1] * len(meta):
            into.index_fill_(0, page, meta[0])
        else:
            into.index_copy_(0, page, torch.tensor(meta, dtype=torch.int32, device=key.device))
        counts += 1
        if minmax:
            _extend(pages, page, torch.tensor(offsets, device=key.device), key)
        return
    where = torch.tensor([h, columns, offsets, meta], device=key.device)
    heads, column, offset, at = where.unbind()
    page = table[heads, column].long()
    slot = page * size + offset
    key, value = key[heads], value[heads]
    pages.k.view(-1, dim).index_copy_(0, slot, key)
    pages.v.view(-1, value.shape[1]).index_copy_(0, slot, value)
    pages.meta.view(-1).index_copy_(0, slot, at.int())
    counts[heads] += 1
    if minmax:
        _extend(pages, page, offset, key)


def _extend(pages: Pages, page: Tensor, offset: Tensor, key: Tensor) -> None:
    """Extends the minima and maxima of pages `[n]` by keys `[n, D]` that went to slots `offset`."""
    assert pages.summary is not None
    extent = pages.summary[page].view(-1, 2, key.shape[1])
    first = (offset == 0)[:, None]
    low = torch.where(first, key, torch.minimum(extent[:, 0], key))
    high = torch.where(first, key, torch.maximum(extent[:, 1], key))
    pages.summary[page] = torch.cat([low, high], -1)


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
