"""Writing tokens: into pages after a prompt call, into ring and pages for a decoded token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, MARKED, POSITION_BITS, Heads, Pages, Ring, ring_slot
from ._host_write import on_host, write_on_host
from ._pages import extend_minmax, take_pages


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
    at, on = lengths.tolist(), active.tolist()
    puts = [(ring.k, key), (ring.v, value)]
    if query is not None and queries is not None:
        puts.append((queries, query))
    if on_host(pages, puts):
        write_on_host(
            pages, heads, ring, puts, flags, at, on, window, minmax=minmax, bits=bits
        )  # fmt: skip
        return
    for row, length in enumerate(at):
        if not on[row]:
            continue
        if length >= window:
            out = ring.slot(length - window)
            own = Heads(heads.table[row], heads.counts[row])
            k, v, f = (x[row, :, out] for x in ring)
            _promote(pages, own, k, v, f, length - window, minmax)
        for held, new in puts:
            held[row, :, ring_slot(length, held.shape[2])] = new[row]
        ring.flags[row, :, ring.slot(length)] = bits if flags is None else flags[row] | bits


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
    where = torch.tensor([h, columns, offsets, meta], device=key.device)
    heads, column, offset, at = where.unbind()
    page = table[heads, column].long()
    slot = page * size + offset
    key, value = key[heads], value[heads]
    pages.k.view(-1, dim).index_copy_(0, slot, key)
    pages.v.view(-1, value.shape[1]).index_copy_(0, slot, value)
    pages.meta.view(-1).index_copy_(0, slot, at.int())
    if minmax:
        extend_minmax(pages, page, offset, key)
    counts[heads] += 1  # last, so that what is broken off holds no token by halves
