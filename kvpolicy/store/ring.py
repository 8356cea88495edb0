"""Rings of recent tokens; where a position lies is `Ring.slot`'s to say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Segments, ring_positions, ring_slot


def recent(ring: Tensor, new: Tensor, seg: Segments) -> Tensor:
    """New tokens `[Hkv, T, ...]` preceded, per sequence, by the ring's `[B, Hkv, slots, ...]`."""
    if seg.cu_q == seg.cu_k:
        return new
    slots = ring.shape[2]
    if len(seg.start) == 1:
        end = seg.start[0]
        at = torch.arange(end - seg.cu_k[1] + seg.cu_q[1], end, device=new.device)
        before = ring[0].index_select(1, ring_slot(at, slots))
        if ring.ndim == 3:
            return torch.cat([before, new], 1)
        # Token after token, as they leave a projection: whole rows are copied.
        before = before.transpose(0, 1).contiguous()
        return torch.cat([before, new.transpose(0, 1)]).transpose(0, 1)
    # A fixed number of launches for any number of sequences.
    rows, at, _ = seg.places()
    start = seg.start_dev.long()[rows]
    held = rows * slots + ring_slot(at, slots)
    fresh = len(seg.start) * slots + seg.cu_q_dev.long()[rows] + at - start
    source = torch.cat([ring.transpose(0, 1).flatten(1, 2), new], 1)
    return source.index_select(1, torch.where(at < start, held, fresh))


def keep_last(ring: Tensor, new: Tensor, seg: Segments, shared: dict[Any, Any]) -> None:
    """Writes the last new tokens `[H, T, ...]` of each sequence to a ring `[B, H, slots, ...]`.

    Places, once for rings of a call with as many slots, are in `shared`.
    """
    slots = ring.shape[2]
    key = "slots", slots, ring.device
    if len(seg.start) == 1:
        count = min(seg.cu_q[1], slots)
        if key not in shared:
            after = seg.start[0] + seg.cu_q[1]
            shared[key] = ring_slot(torch.arange(after - count, after, device=ring.device), slots)
        ring[0].index_copy_(1, shared[key], new[:, seg.cu_q[1] - count :])
        return
    # A fixed number of launches for any number of sequences.
    if key not in shared:
        cu, start = seg.cu_q_dev.long(), seg.start_dev.long()[:, None]
        first = cu[:-1, None]
        at = ring_positions(start + cu[1:, None] - first, slots)
        fresh = at >= start
        shared[key] = fresh, torch.where(fresh, first + at - start, 0)
    fresh, index = shared[key]
    mask = fresh.view(len(fresh), 1, slots, *[1] * (ring.ndim - 3))
    ring.copy_(torch.where(mask, new[:, index].transpose(0, 1), ring))


def last(
    ring: Tensor, lengths: Tensor, count: int, shared: dict[Any, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The last `count` tokens `[B, H, count, ...]` of sequences of `lengths` `[B]`, in order.

    And the positions `[B, count]` that they are at, negative ones before the first token. Places,
    once for rings of as many slots, are in `shared`, which is of these `lengths`.
    """
    shared = {} if shared is None else shared
    key = "last", count, ring.shape[2], ring.device
    if key not in shared:
        at = torch.arange(-count, 0, device=ring.device) + lengths[:, None]
        shared[key] = ring_slot(at, ring.shape[2])[:, None, :, None], at
    slot, at = shared[key]
    return ring.gather(2, slot.expand(-1, ring.shape[1], -1, ring.shape[3])), at
