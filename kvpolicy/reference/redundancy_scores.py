"""R-KV's scores, one head after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Heads, Pages, Ring, check_asked, ring_slot
from .redundancy import last_similar

_WIDE = 1 << 14  # tokens in float64


def redundancy_scores(
    pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor, window: int,
    scale: float, *, observation: int, kernel: int, mix: float, threshold: float, group: str,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Scores `[B, Hkv, M * P]`: `Ops.redundancy_scores`."""
    check_asked("redundancy_scores", queries.shape[1], softcap, None)
    (batch, kv_heads, columns), size = heads.table.shape, pages.k.shape[1]
    wide = torch.promote_types(pages.k.dtype, torch.float32)
    found = pages.k.new_zeros(batch, kv_heads, columns * size, dtype=wide)
    grouped = queries.unflatten(1, (kv_heads, -1))
    for row, length in enumerate(lengths.tolist()):
        at = torch.arange(max(length - window, 0), length, device=pages.k.device)
        asked = torch.arange(max(length - observation, 0), length, device=pages.k.device)
        for head, count in enumerate(heads.counts[row].tolist()):
            if not count:
                continue
            ids = heads.table[row, head, : -(-count // size)].long()
            keys = pages.k[ids].flatten(0, 1)[:count]
            q = grouped[row, head][:, ring_slot(asked, queries.shape[2])].to(wide)  # [G, w, D]
            logits = q @ keys.to(wide).T * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.amax(0) if group == "max" else logits.mean(0)
            mass = logits.softmax(-1).sum(0) / max(len(asked), 1)
            seen = F.max_pool1d(mass[None], kernel, 1, kernel // 2)[0]
            near = ring.k[row, head, ring_slot(at, ring.k.shape[2])]
            alike = _means(_units(torch.cat([keys, near])), threshold).softmax(0)[:count]
            found[row, head, :count] = seen * mix - alike * (1 - mix)
    return found


def _units(keys: Tensor) -> Tensor:
    """Keys `[n, D]` over their norms, in their dtype and in place."""
    for part in keys.split(_WIDE):
        own = part.to(torch.promote_types(keys.dtype, torch.float32))
        part.copy_(own / (torch.linalg.vector_norm(own, dim=-1, keepdim=True) + 1e-8))
    return keys


def _means(units: Tensor, threshold: float) -> Tensor:
    """The mean `[n]` float64 of the cosines that count of each of a head's keys."""
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
    return sums / many
