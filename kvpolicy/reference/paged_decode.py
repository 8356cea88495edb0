"""Attention of one decoded token a sequence over ring and pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Pages


def paged_decode(
    query: Tensor,
    pages: Pages,
    table: Tensor,
    counts: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    lengths: Tensor,
    active: Tensor,
    window: int,
    scale: float,
    selected: Tensor | None = None,
) -> Tensor:
    """Attends over the local window and the global tokens, all or the selected pages of them.

    `query` `[B, Hq, D]` stands at position `lengths` `[B]`, whose key is in the ring already; ring
    `[B, Hkv, slots, D]`, `table` `[B, Hkv, M]`, `counts` `[B, Hkv]`. `selected` `[B, Hs, K]` names
    pages within the head (-1: none) for Hs = Hkv or Hq heads. Returns `[B, Hq, D]`, zeros for rows
    that are not `active`.
    """
    batch, kv_heads, slots, dim = ring_k.shape
    size = pages.k.shape[1]
    if selected is not None and selected.shape[1] != kv_heads:
        repeat = selected.shape[1] // kv_heads
        table, counts = table.repeat_interleave(repeat, 1), counts.repeat_interleave(repeat, 1)
        ring_k, ring_v = ring_k.repeat_interleave(repeat, 1), ring_v.repeat_interleave(repeat, 1)
        kv_heads = selected.shape[1]
    if selected is None:
        used = -(-int(counts.max()) // size)
        ids = table[:, :, :used]
        start = torch.arange(used, device=table.device) * size
    else:
        ids = table.gather(2, selected.clamp(min=0).long())
        # An unselected entry starts past every count, so none of its tokens is valid.
        start = torch.where(selected >= 0, selected * size, torch.iinfo(torch.int32).max - size)
    flat = ids.reshape(-1)
    k = pages.k.index_select(0, flat).view(batch, kv_heads, ids.shape[2] * size, dim)
    v = pages.v.index_select(0, flat).view(batch, kv_heads, ids.shape[2] * size, dim)
    token = start[..., None] + torch.arange(size, device=table.device)
    token = token.expand(batch, kv_heads, -1, size).flatten(2)
    back = (lengths[:, None] - torch.arange(slots, device=table.device)).remainder_(slots)
    near = back < (lengths + 1).clamp_(max=window)[:, None]
    near = near[:, None].expand(-1, kv_heads, -1)
    hidden = torch.cat([token < counts[..., None], near], -1).logical_not_()[:, :, None]

    q = query.view(batch, kv_heads, -1, dim)
    scores = torch.cat([q @ k.transpose(2, 3), q @ ring_k.transpose(2, 3)], -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(v.dtype)
    out = weights[..., : k.shape[2]] @ v + weights[..., k.shape[2] :] @ ring_v
    out = out.view(batch, -1, dim)
    return out if bool(active.all()) else out * active[:, None, None]
