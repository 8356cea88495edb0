"""Separately allocated pieces of a pool: where their slabs lie, and pages from one to another."""

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


def copy_between(extents: list[Extent], source: Tensor, target: Tensor) -> None:
    """Copies whole pages `source` `[N]` to pages `target` `[N]`, ids of the pool."""
    starts = [0]
    for extent in extents:
        starts.append(starts[-1] + extent[0].shape[0])
    bounds = torch.tensor(starts[1:], device=source.device)
    from_extent = torch.bucketize(source, bounds, right=True)
    to_extent = torch.bucketize(target, bounds, right=True)
    pair = from_extent * len(extents) + to_extent
    order = pair.sort(stable=True).indices
    pairs, counts = pair.unique(return_counts=True)
    amounts = counts.tolist()
    parts = zip(source[order].split(amounts), target[order].split(amounts), strict=True)
    for code, (old_ids, new_ids) in zip(pairs.tolist(), parts, strict=True):
        i, j = divmod(code, len(extents))
        for old, new in zip(extents[i], extents[j], strict=True):
            if old is not None and new is not None:
                new.index_copy_(0, new_ids - starts[j], old.index_select(0, old_ids - starts[i]))


def widened(tensor: Tensor, size: int) -> Tensor:
    """The tensor with its first dimension `size`, zeros at the end."""
    wide = tensor.new_zeros(size, *tensor.shape[1:])
    wide[: tensor.shape[0]] = tensor
    return wide
