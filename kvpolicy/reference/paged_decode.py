"""Attention of one decoded token a sequence over ring and pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import POSITION_MASK, Heads, Pages, Ring, check_asked
from ._even import attend_even
from ._even_host import attend_on_host, serves
from ._logits import logits, softmax, widened
from ._lying import lying, row_of


def paged_decode(
    query: Tensor,
    pages: Pages,
    heads: Heads,
    ring: Ring,
    lengths: Tensor,
    active: Tensor,
    window: int,
    scale: float,
    selected: Tensor | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention `[B, Hq, Dv]` over the local window and the global tokens: `Ops.paged_decode`."""
    check_asked("paged_decode", query.shape[1], softcap, sinks, chunk)
    if rows is not None:
        index = rows.long()
        heads, ring = Heads(*(x[index] for x in heads)), Ring(*(x[index] for x in ring))
        lengths, active = lengths[index], active[index]
    table, counts = heads
    ring_k, ring_v, _ = ring
    batch, kv_heads, slots, dim = ring_k.shape
    size = pages.k.shape[1]
    if batch == 1 and selected is None and chunk is None:
        (held,) = counts.tolist()
        if held == held[:1] * kv_heads:
            if not bool(active):
                return query.new_zeros(1, query.shape[1], ring_v.shape[3])
            attend = attend_on_host if serves(query, pages, ring) else attend_even
            return attend(
                query, pages, table, held[0], ring, int(lengths), window, scale, softcap, sinks
            )
    if selected is not None and selected.shape[1] != kv_heads:
        repeat = selected.shape[1] // kv_heads
        table, counts = table.repeat_interleave(repeat, 1), counts.repeat_interleave(repeat, 1)
        ring_k, ring_v = ring_k.repeat_interleave(repeat, 1), ring_v.repeat_interleave(repeat, 1)
        kv_heads = selected.shape[1]
    run, row = 0, None
    if selected is None:
        used = -(-int(counts.max()) // size)
        ids = table[:, :, :used]
        start = torch.arange(used, device=table.device) * size
        row = row_of(table, used)
        run = row.length
    else:
        ids = table.gather(2, selected.clamp(min=0).long())
        # An unselected entry starts past every count, so none of its tokens is valid.
        start = torch.where(selected >= 0, selected * size, torch.iinfo(torch.int32).max - size)
    # Keys and values in up to three parts: pages that lie in a row, other pages, the ring.
    parts = [(ring_k, ring_v)]
    if ids.shape[2] > run:
        flat = ids[:, :, run:].reshape(-1)
        shape = (batch, kv_heads, (ids.shape[2] - run) * size, -1)
        gathered = [x.index_select(0, flat).view(shape) for x in (pages.k, pages.v)]
        parts.insert(0, (gathered[0], gathered[1]))
    if row is not None and run:
        k, v = (lying(x, row, run * size).unflatten(0, (batch, -1)) for x in (pages.k, pages.v))
        parts.insert(0, (k, v))

    q = query.view(batch, kv_heads, -1, dim)
    scores = torch.cat([logits(q, k, scale, softcap) for k, _ in parts], -1)
    token = start[..., None] + torch.arange(size, device=table.device)
    token = token.expand(batch, kv_heads, -1, size).flatten(2)
    back = ring.slot(lengths[:, None] - torch.arange(slots, device=table.device))
    reach, far = (lengths + 1).clamp_(max=window), token < counts[..., None]
    if chunk is not None:
        reach = reach.minimum(lengths % chunk + 1)
        at = (pages.meta[ids.long()] & POSITION_MASK).flatten(2)
        far &= at >= (lengths - lengths % chunk)[:, None, None]
    near = (back < reach[:, None])[:, None].expand(-1, kv_heads, -1)
    hidden = torch.cat([far, near], -1).logical_not_()[:, :, None]
    scores.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        sinks = sinks.view(kv_heads, -1)
    weights = softmax(scores, sinks).to(ring_v.dtype)
    shares = widened(weights).split([v.shape[2] for _, v in parts], -1)
    out = sum(share @ widened(v) for share, (_, v) in zip(shares, parts, strict=True))
    out = out.view(batch, -1, ring_v.shape[3]).to(query.dtype)
    return out if bool(active.all()) else out * active[:, None, None]
