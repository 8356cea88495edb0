"""How far keys or values lie outside the range of the partition after theirs, from pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages, Ring, ring_slot, whole_lags

_TOKENS = 1 << 14  # of a head that are looked at at once


def lag_spreads(
    pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, window: int, *, sinks: int, lag: int,
    values: bool = False,
) -> Tensor:  # fmt: skip
    """Spreads `[B, Hkv, parts, lag]` of stored tokens and the window's: `Ops.lag_spreads`."""
    store, near = (pages.v, ring.v) if values else (pages.k, ring.k)
    size, (batch, kv_heads, columns) = store.shape[1], heads.table.shape
    parts = whole_lags(columns * size + window - sinks, lag)
    wide = torch.promote_types(store.dtype, torch.float32)
    found = torch.zeros(batch, kv_heads, parts, lag, dtype=wide, device=store.device)
    step = max(_TOKENS // lag, 1)
    ends = zip(heads.counts.tolist(), lengths.tolist(), strict=True)
    for row, (counts, length) in enumerate(ends):
        recent = min(length, window)
        slots = ring_slot(torch.arange(length - recent, length, device=store.device), ring.slots)
        for head, count in enumerate(counts):
            here = whole_lags(count + recent - sinks, lag)
            for part in range(0, here, step):
                begin = sinks + part * lag
                end = sinks + (min(part + step, here) + 1) * lag
                ids = heads.table[row, head, begin // size : -(-min(end, count) // size)].long()
                low = begin // size * size
                tokens = store[ids].flatten(0, 1)[: count - low][begin - low : end - low]
                if end > count:
                    own = near[row, head, slots[max(begin - count, 0) : end - count]]
                    tokens = torch.cat([tokens, own])
                found[row, head, part : part + step][: here - part] = _spreads(tokens.to(wide), lag)
    return found


def _spreads(x: Tensor, lag: int) -> Tensor:
    """Of tokens `[(n + 1) * lag, D]`, those of the first n partitions: `[n, lag]`."""
    x = x.unflatten(0, (-1, lag))
    low, high = x.amin(1, keepdim=True)[1:], x.amax(1, keepdim=True)[1:]
    apart = (high - low).masked_fill(high == low, 1.0)
    return ((x[:-1] - low) / apart).std(-1)
