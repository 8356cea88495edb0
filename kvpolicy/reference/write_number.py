"""Numbers of decoded tokens: the leaving one's goes beside the pages, the new one's to the ring."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, Numbers, ring_slot


def write_number(
    numbers: Numbers,
    counts: Tensor,
    flags: Tensor,
    number: Tensor | None,
    lengths: Tensor,
    active: Tensor,
    window: int,
) -> None:
    """Numbers of one decoded token a sequence: `Ops.write_number`."""
    stored, recent = numbers
    slots = recent.shape[2]
    out = ring_slot((lengths - window).clamp(min=0), slots)[:, None, None]
    out = out.expand(-1, recent.shape[1], 1)
    leaves = (flags.gather(2, out) & ADMITTED) > 0
    leaves &= (active & (lengths >= window))[:, None, None]
    place = counts.long()[..., None].clamp(max=stored.shape[2] - 1)
    stored.scatter_(2, place, torch.where(leaves, recent.gather(2, out), stored.gather(2, place)))
    slot = ring_slot(lengths, slots)[:, None, None].expand_as(out)
    new = torch.zeros_like(recent[..., :1]) if number is None else number[..., None].to(recent)
    recent.scatter_(2, slot, torch.where(active[:, None, None], new, recent.gather(2, slot)))
