"""How much a head's keys repeat each other, one head after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages, Ring, ring_slot
from .redundancy import last_similar

_WIDE = 1 << 14  # tokens in float32


def mean_cosines(
    pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, window: int, threshold: float
) -> Tensor:
    """Means `[B, Hkv, M * P + window]`: `Ops.mean_cosines`."""
    (batch, kv_heads, columns), size = heads.table.shape, pages.k.shape[1]
    wide = torch.promote_types(pages.k.dtype, torch.float32)
    found = pages.k.new_zeros(batch, kv_heads, columns * size + window, dtype=wide)
    for row, (counts, length) in enumerate(
        zip(heads.counts.tolist(), lengths.tolist(), strict=True)
    ):
        at = torch.arange(max(length - window, 0), length, device=pages.k.device)
        for head, count in enumerate(counts):
            ids = heads.table[row, head, : -(-count // size)].long()
            near = ring.k[row, head, ring_slot(at, ring.k.shape[2])]
            units = _units(torch.cat([pages.k[ids].flatten(0, 1)[:count], near]))
            found[row, head, : len(units)] = _means(units, threshold)
    return found


def _units(keys: Tensor) -> Tensor:
    """Keys `[n, D]` over their norms, in their dtype and in place."""
    for part in keys.split(_WIDE):
        own = part.to(torch.promote_types(keys.dtype, torch.float32))
        part.copy_(own / (torch.linalg.vector_norm(own, dim=-1, keepdim=True) + 1e-8))
    return keys


def _means(units: Tensor, threshold: float) -> Tensor:
    """Means `[n]` of the cosines that count."""
    many = len(units)
    length = torch.tensor([many], device=units.device)
    retained = last_similar(units[None], length, threshold)[0].long().clamp_(min=0)
    place = torch.arange(many, device=units.device)
    sums = torch.zeros(many, dtype=torch.float64, device=units.device)
    total = torch.zeros(units.shape[1], dtype=torch.float64, device=units.device)
    for part in place.split(_WIDE):
        total += units[part].double().sum(0)
    for part in place.split(_WIDE):
        own, to = units[part].double(), retained[part]
        sums[part] += own @ total - own.square().sum(1)
        kept = (own * units[to].double()).sum(1).masked_fill(to == part, 0)
        sums.index_add_(0, to, -kept)
    return sums / max(many, 1)
