"""Norms of stored keys or values, straight from pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages


def key_norms(pages: Pages, heads: Heads) -> Tensor:
    """|k| of stored keys `[B, Hkv, M * P]`: `Ops.key_norms`."""
    return _of(pages.k, heads)


def value_norms(pages: Pages, heads: Heads) -> Tensor:
    """|v| of stored values `[B, Hkv, M * P]`: `Ops.value_norms`."""
    return _of(pages.v, heads)


def _of(store: Tensor, heads: Heads) -> Tensor:
    ids = heads.table.long()
    wide = torch.promote_types(store.dtype, torch.float32)
    found = store.new_zeros(*ids.shape, store.shape[1], dtype=wide)
    for row in range(ids.shape[0]):
        norms = torch.linalg.vector_norm(store[ids[row]], dim=-1, dtype=wide)
        found[row] = norms
    out = found.flatten(2)
    held = torch.arange(out.shape[2], device=out.device) < heads.counts[..., None]
    return out.masked_fill_(~held, 0)
