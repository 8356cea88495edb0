"""The ring of a layer in a prompt call: what it adds to the new tokens, and what it holds then."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..ops import Ring, Segments


def advance_ring(
    ring: Ring, key: Tensor, value: Tensor, flags: Tensor, segments: Segments, *, undo: bool
) -> tuple[Ring, Ring | None]:
    """Recent tokens of a prompt call; the ring keeps the last ones: `Ops.advance_ring`."""
    before = Ring(*(x.clone() for x in ring)) if undo else None
    news = Ring(key, value, flags)
    recent = news
    if segments.cu_q != segments.cu_k:
        recent = Ring(*(_joined(x, new, segments) for x, new in zip(ring, news, strict=True)))
    for row, (start, (q0, q1)) in enumerate(_rows(segments)):
        count = min(q1 - q0, ring.slots)
        at = torch.arange(start + q1 - q0 - count, start + q1 - q0, device=key.device)
        for held, new in zip(ring, news, strict=True):
            held[row].index_copy_(1, ring.slot(at), new[:, q1 - count : q1])
    return recent, before


def _rows(segments: Segments) -> list[tuple[int, tuple[int, int]]]:
    """Where the new tokens of each sequence begin, and which of the packed ones they are."""
    return list(zip(segments.start, pairwise(segments.cu_q), strict=True))


def _joined(ring: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """New tokens `[Hkv, T, ...]` after those of `[B, Hkv, S, ...]`, sequence after sequence.

    Token after token, as they leave a projection: whole rows are copied.
    """
    parts = []
    keys = pairwise(segments.cu_k)
    for row, ((start, (q0, q1)), (k0, k1)) in enumerate(zip(_rows(segments), keys, strict=True)):
        at = torch.arange(start - (k1 - k0) + q1 - q0, start, device=new.device)
        held = ring[row].index_select(1, at % ring.shape[2])
        parts += [held.transpose(0, 1), new[:, q0:q1].transpose(0, 1)]
    return torch.cat(parts).transpose(0, 1)
