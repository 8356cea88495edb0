"""Whole pages from and to tensors outside the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import LayerStore
from .state import CacheState


def write_pages(
    state: CacheState, layer: LayerStore, ids: Tensor, k: Tensor, v: Tensor, meta: Tensor
) -> None:
    """Fills pages `ids` int32 `[n]` with `k` `[n, P, D]`, `v` `[n, P, Dv]`, `meta` `[n, P]`."""
    slots = torch.arange(meta.numel(), dtype=torch.int32, device=ids.device)[None]
    state.ops.append(
        layer.pool.pages, ids[None, None], k.flatten(0, 1)[None], v.flatten(0, 1)[None],
        meta.flatten()[None], slots, torch.zeros_like(slots[0]),
    )  # fmt: skip
