"""Which keys of a head resemble which, a block of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512  # keys that are compared with a block of others
_COLUMNS = 4096


def last_similar(keys: Tensor, lengths: Tensor, threshold: float) -> Tensor:
    """The last other key of a head that resembles each of its keys: `Ops.last_similar`."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    found = torch.full(keys.shape[:2], -1, dtype=torch.int32, device=keys.device)
    for unit, length in enumerate(lengths.tolist()):
        own = keys[unit, :length].to(wide)
        for low in range(0, length, _ROWS):
            rows = own[low : low + _ROWS]
            best = found[unit, low : low + len(rows)]
            here = torch.arange(low, low + len(rows), device=keys.device)[:, None]
            for start in range((length - 1) // _COLUMNS * _COLUMNS, -1, -_COLUMNS):
                columns = own[start : min(start + _COLUMNS, length)]
                at = torch.arange(start, start + len(columns), device=keys.device)
                alike = (rows @ columns.T > threshold) & (at != here)
                last = torch.where(alike, at, -1).amax(1).int()
                torch.maximum(best, last, out=best)
                if bool((best >= 0).all()):
                    break  # what comes before is not the last
    return found
