"""Choosing the pages that a query reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages


def quest_select(
    pages: Pages,
    heads: Heads,
    query: Tensor,
    budget: int,
    group: str,
    first: int,
    last: int,
) -> Tensor:
    """Pages `[B, Hkv or Hq, budget]` by the upper bound of q.k inside them: `Ops.quest_select`."""
    assert pages.summary is not None
    table, counts = heads
    batch, kv_heads = counts.shape
    size, dim = pages.k.shape[1], pages.k.shape[2]
    used = max(-(-int(counts.max()) // size), 1)
    ids = table[:, :, :used].reshape(-1).long()
    extent = pages.summary.index_select(0, ids).view(batch, kv_heads, 1, used, 2, dim).float()
    q = query.view(batch, kv_heads, -1, 1, dim).float()
    scores = torch.maximum(q * extent[..., 0, :], q * extent[..., 1, :]).sum(-1)
    if group == "each":
        scores = scores.flatten(1, 2)
    elif group == "max":
        scores = scores.amax(2)
    else:  # one after the other: a sum over a dimension is rounded by the place in the others
        scores = sum(scores.unbind(2), scores.new_zeros(())) / scores.shape[2]
    return top_pages(scores, counts, size, budget, first, last)


def top_pages(
    scores: Tensor, counts: Tensor, page_size: int, budget: int, first: int, last: int
) -> Tensor:
    """The `budget` best pages `[B, Hs, budget]` of each head: `Ops.top_pages`."""
    batch, heads, width = scores.shape
    held = (counts + page_size - 1) // page_size
    held = held.repeat_interleave(heads // counts.shape[1], 1)[..., None]
    page = torch.arange(width, device=scores.device)
    scores = scores.float().masked_fill(page < first, float("inf"))
    # The trailing pages come before the leading ones when the budget is too small for both.
    trailing = held - last
    if last < 0:  # a full page ends where the next would begin
        trailing = (counts // page_size).repeat_interleave(heads // counts.shape[1], 1)[..., None]
    tier = ((page >= trailing) & (page < held)).to(torch.int8)
    scores = scores.masked_fill(page >= held, float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    tier = tier.gather(-1, order)
    order = order.gather(-1, tier.sort(dim=-1, descending=True, stable=True).indices)[..., :budget]
    order = torch.where(order < held, order, width).sort(-1).values
    order = torch.where(order < width, order, -1)
    if order.shape[-1] < budget:
        order = torch.nn.functional.pad(order, (0, budget - order.shape[-1]), value=-1)
    # Rising order with the padding at the end.
    return order.int()
