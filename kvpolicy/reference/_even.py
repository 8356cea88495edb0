"""Decoding of one sequence whose heads hold as many tokens each: only slots of the ring are masked.

On a CPU, which reads three products of keys faster than it calls operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pages, Ring, ring_slot
from ._logits import softmax, widened
from ._lying import Row, lying, row_of


def attend_even(
    query: Tensor, pages: Pages, table: Tensor, held: int, ring: Ring, length: int, window: int,
    scale: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention `[1, Hq, Dv]` over `held` global tokens and the window that ends at `length`."""
    ring_k, ring_v, _ = ring
    _, kv_heads, slots, dim = ring_k.shape
    keys, values = [ring_k.squeeze(0)], [ring_v.squeeze(0)]
    if held:
        row = row_of(table, -(-held // pages.k.shape[1]))
        keys, values = _parts(pages.k, row, held) + keys, _parts(pages.v, row, held) + values
    q, dtype = query.view(kv_heads, -1, dim), query.dtype
    exact = dtype in (torch.float32, torch.float64)
    if exact:
        q = q * scale  # a few numbers, where logits are many
        found = [torch.bmm(q, k.mT) for k in keys]
        scores = torch.cat(found, 2) if held else found[0]
    else:
        q = widened(q)
        scores = torch.cat([torch.bmm(q, widened(k).mT) for k in keys], 2).float().mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    for low, high in hidden_slots(slots, length, window):
        scores.narrow(2, held + low, high - low).fill_(float("-inf"))
    weights = softmax(scores, None if sinks is None else sinks.view(kv_heads, -1))
    if not (exact and weights.dtype == ring_v.dtype):
        weights, values = widened(weights.to(ring_v.dtype)), [widened(v) for v in values]
    shares = weights.split_with_sizes([v.shape[1] for v in values], 2)
    out = torch.bmm(shares[0], values[0])
    for share, value in zip(shares[1:], values[1:], strict=True):
        out.baddbmm_(share, value)
    out = out.view(1, -1, ring_v.shape[3])
    return out if exact else out.to(dtype)


def _parts(store: Tensor, row: Row, held: int) -> list[Tensor]:
    """Tokens `[Hkv, n, D]` of pages that lie in a row, and copies of those of other pages."""
    _, size, dim = store.shape
    there = row.length * size
    if held <= there:
        return [lying(store, row, held)]
    apart = store.index_select(0, row.others).view(row.heads, -1, dim)
    if apart.shape[1] > held - there:
        apart = apart.narrow(1, 0, held - there)
    return [lying(store, row, there), apart] if there else [apart]


def hidden_slots(slots: int, length: int, window: int) -> list[tuple[int, int]]:
    """Ranges of a ring's slots outside the window that ends at position `length`."""
    low = ring_slot(length + 1, slots)
    high = low + slots - min(window, length + 1)
    ranges = [(low, min(high, slots)), (0, high - slots)]
    return [(first, last) for first, last in ranges if first < last]
