"""Which keys of a head resemble which: tiles of cosines, of which only a place is kept.

A program holds a tile of keys and goes through all others from the last to the first, until each of
its keys has met one that resembles it; it asks so after some hundreds of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, check_dims, check_dtype, dot_size, on
from ._math import dot

_CHUNK = 512  # keys that are compared before it is asked whether others are needed


def last_similar(keys: Tensor, lengths: Tensor, threshold: float) -> Tensor:
    """Places int32 `[U, N]`; see `Ops.last_similar`."""
    check_dtype("last_similar", "keys", keys)
    units, width, dim = keys.shape
    check_dims("last_similar", dim)
    out = torch.empty(units, width, dtype=torch.int32, device=keys.device)
    if not out.numel():
        return out
    keys, pad = keys.contiguous(), dot_size(dim)
    if keys.element_size() == 4 or pad > 256:
        side = 16 if keys.element_size() == 4 and pad > 256 else 32
        rows = columns = side
    else:
        rows, columns = (128, 64) if pad <= 128 else (64, 64)
    with on(keys):
        _last_similar[cdiv(width, rows), units](
            keys, lengths.contiguous(), out, width, float(threshold), DIM=dim, DIM_PAD=pad,
            ROWS=rows, COLUMNS=columns, CHUNK=_CHUNK, STAGES=3 if pad <= 256 else 2,
            num_warps=8 if rows == 128 else 4,
        )  # fmt: skip
    return out


@triton.jit
def _last_similar(
    keys, lengths, out, width, threshold,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a tile of a head's keys the last other one whose cosine exceeds the threshold."""
    unit = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, d = tl.arange(0, COLUMNS), tl.arange(0, DIM_PAD)
    length = tl.load(lengths + unit).to(tl.int32)
    keys += unit * width * DIM
    best = tl.full([ROWS], -1, tl.int32)
    if tl.program_id(0) * ROWS < length:
        held = (i < length)[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + i[:, None].to(tl.int64) * DIM + d[None, :], mask=held, other=0.0)
        start = (length - 1) // CHUNK * CHUNK
        left = 1
        while (start >= 0) & (left > 0):
            for step in tl.range(0, CHUNK, COLUMNS, num_stages=STAGES):
                j = start + step + c
                there = (j < length)[:, None] & (d < DIM)[None, :]
                from_j = keys + j[:, None].to(tl.int64) * DIM + d[None, :]
                other = tl.load(from_j, mask=there, other=0.0)  # [N, D]
                cosine = dot(k, tl.trans(other), tl.zeros([ROWS, COLUMNS], tl.float32))
                alike = (cosine > threshold) & (j < length)[None, :] & (i[:, None] != j[None, :])
                best = tl.maximum(best, tl.max(tl.where(alike, j[None, :], -1), 1))
            left = tl.max(tl.where((best < 0) & (i < length), 1, 0), 0)
            start -= CHUNK
    tl.store(out + unit * width + i, best, mask=i < width)
