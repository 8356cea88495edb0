"""Separately allocated pieces of a pool, and where their slabs lie."""

from __future__ import annotations

import torch
from torch import Tensor

SLAB_PAGES = 64
UNIT = 16  # elements; slab offsets are multiples of it

Extent = tuple[Tensor, Tensor, Tensor, Tensor | None]  # k, v, meta and summary of some pages


def slab_starts(first: Extent, extent: Extent, slabs: int) -> Tensor:
    """Starts of the slabs of `extent`, relative to the first extent: int64 `[slabs, 4]` UNITs."""
    starts = []
    for base, new in zip(first, extent, strict=True):
        if base is None or new is None:
            starts.append(torch.zeros(slabs, dtype=torch.int64))
            continue
        # Allocations are aligned to more than UNIT elements of 4 bytes or less.
        offset = (new.data_ptr() - base.data_ptr()) // (base.element_size() * UNIT)
        step = SLAB_PAGES * base[0].numel() // UNIT
        starts.append(offset + step * torch.arange(slabs, dtype=torch.int64))
    return torch.stack(starts, 1)


def widened(tensor: Tensor, size: int) -> Tensor:
    """The tensor with its first dimension `size`, zeros at the end."""
    wide = tensor.new_zeros(size, *tensor.shape[1:])
    wide[: tensor.shape[0]] = tensor
    return wide
