"""Norms of what stored values add to the residual stream, straight from pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages
from ._heads import each_chunk

_PRODUCTS = 1 << 22  # that are held at once


def projected_norms(pages: Pages, heads: Heads, weight: Tensor) -> Tensor:
    """Mean over a group of |W v|_1 of stored values `[B, Hkv, M * P]`: `Ops.projected_norms`."""
    batch, kv_heads, columns = heads.table.shape
    wide = torch.promote_types(pages.v.dtype, torch.float32)
    found = torch.zeros(
        batch, kv_heads, columns * pages.v.shape[1], dtype=wide, device=pages.v.device
    )
    group = weight.to(wide).unflatten(0, (kv_heads, -1))  # [Hkv, G, Dv, hidden]
    step = max(_PRODUCTS // (group.shape[1] * group.shape[3]), 1)
    for row, head, low, own in each_chunk(pages.v, heads):
        for part in own.to(wide).split(step):
            sums = torch.linalg.vector_norm(part @ group[head], 1, (0, 2))
            found[row, head, low : low + len(part)] = sums / group.shape[1]
            low += len(part)
    return found
