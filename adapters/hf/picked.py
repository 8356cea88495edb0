"""Which sequences of a cache a caller picks, as the tensors of transformers' own caches read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def indexed(indices: Any, batch: int) -> list[int]:
    """What `indices` picks of a tensor's `batch` rows; -1 among numbers, a new sequence, stays.

    Raises ValueError for what picks no rows.
    """
    wanted = (
        f"indices: wanted numbers of the {batch} sequences, of which -1 is a new, empty one, "
        "a mask or a slice"
    )
    try:
        where = indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
        found = torch.arange(batch)[where]
    except (IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {indices!r}") from error
    if found.ndim != 1:
        raise ValueError(f"{wanted}, got {indices!r}")
    if not isinstance(where, Tensor) or where.dtype in (torch.bool, torch.uint8):
        return [int(row) for row in found]
    rows = [int(row) for row in where]
    if min(rows, default=0) < -1:
        raise ValueError(f"{wanted}, got {indices!r}")
    return rows
