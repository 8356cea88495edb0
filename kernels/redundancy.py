"""Which keys of a head resemble which: tiles of cosines, of which only a place is kept.

Two keys resemble each other either way, so that a pair of tiles is multiplied once and says what it
found to the keys of both: places only grow, in any order. A program holds a tile of keys and goes
through a span of those before it; last tiles come first, and a pair whose keys have all met a later
one that resembles them is left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import cdiv, check_dims, check_dtype, dot_size, on, shared_memory
from ._math import dot

_TILES = 16  # of a span


class Tile(NamedTuple):
    """Keys that a program holds and keys of a step, warps, stages.

    With `descriptors` the device's copy engine loads the keys of a step. `registers` is the most
    that a thread gets, so that two programs fit where one would.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None


def choose_tile(dim: int, itemsize: int, shared: int) -> Tile:
    """For a padded head_dim, an element size and the shared memory of a program."""
    if itemsize == 4 or dim > 256:
        side = 16 if itemsize == 4 and dim > 256 else 32
        return Tile(side, side, 4, 2 if dim > 256 else 3)
    if dim > 128:
        return Tile(64, 64, 4, 3)
    return Tile(128, 128, 8, 2, True, 128) if shared >= 200 << 10 else Tile(128, 64, 8, 3)


def last_similar(keys: Tensor, lengths: Tensor, threshold: float) -> Tensor:
    """Places int32 `[U, N]`; see `Ops.last_similar`."""
    check_dtype("last_similar", "keys", keys)
    units, width, dim = keys.shape
    check_dims("last_similar", dim)
    out = torch.full((units, width), -1, dtype=torch.int32, device=keys.device)
    if out.numel():
        find_last(keys.contiguous(), lengths.contiguous(), out, threshold)
    return out


def find_last(keys: Tensor, lengths: Tensor, out: Tensor, threshold: float) -> None:
    """`last_similar` into `out`, which is -1 everywhere; all are contiguous."""
    (units, width, dim), pad = keys.shape, dot_size(keys.shape[2])
    tile = choose_tile(pad, keys.element_size(), shared_memory(keys.device))
    tiles: Any = keys
    descriptors = tile.descriptors and dim * keys.element_size() % 16 == 0
    if descriptors:
        tiles = TensorDescriptor.from_tensor(keys.view(-1, dim), [tile.columns, pad])
    grid = cdiv(width, _TILES * tile.columns), cdiv(width, tile.rows), units
    with on(keys):
        _last_similar[grid](
            keys, tiles, lengths, out, width, float(threshold), DIM=dim, DIM_PAD=pad,
            ROWS=tile.rows, COLUMNS=tile.columns, TILES=_TILES, DESCRIPTORS=descriptors,
            STAGES=tile.stages, num_warps=tile.warps,
            **({"maxnreg": tile.registers} if tile.registers else {}),
        )  # fmt: skip


@triton.jit
def _last_similar(
    keys, tiles, lengths, out, width, threshold,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of a head's keys against those of a span, where either may find a later one."""
    SPAN: tl.constexpr = TILES * COLUMNS
    unit = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + unit).to(tl.int32)
    low = ((length - 1) // ROWS - tl.program_id(1)) * ROWS  # the first key that is held
    first = ((low + ROWS - 1) // SPAN - tl.program_id(0)) * SPAN  # of the span
    if (length == 0) | (low < 0) | (first < 0):
        return
    keys += unit * width * DIM
    out += unit * width
    i, d = low + tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    c, nth = tl.arange(0, COLUMNS), tl.arange(0, TILES)
    # What others have found so far, or less: a pair is never left out in vain.
    found = tl.load(out + i, mask=i < length, other=width, cache_modifier=".cg")
    least = tl.min(found, 0)
    start = first + nth * COLUMNS
    place = start[:, None] + c[None, :]  # [T, N]
    found = tl.load(out + place, mask=place < length, other=width, cache_modifier=".cg")
    open_ = (tl.min(found, 1) < low + ROWS - 1) | (least < start + COLUMNS - 1)
    open_ = (open_ & (start < tl.minimum(low + ROWS, length))).to(tl.int32)
    rank = tl.cumsum(open_, 0)
    held = (i < length)[:, None] & (d < DIM)[None, :]
    k = tl.load(keys + i[:, None].to(tl.int64) * DIM + d[None, :], mask=held, other=0.0)
    for step in tl.range(0, tl.sum(open_, 0), num_stages=STAGES):
        tile = tl.sum(tl.where((open_ > 0) & (rank == step + 1), nth, 0), 0)
        j = first + tile * COLUMNS + c
        if DESCRIPTORS:  # past the length are keys of another head, or none
            other = tiles.load([(unit * width).to(tl.int32) + first + tile * COLUMNS, 0])
        else:
            there = (j < length)[:, None] & (d < DIM)[None, :]
            from_j = keys + j[:, None].to(tl.int64) * DIM + d[None, :]
            other = tl.load(from_j, mask=there, other=0.0)  # [N, D]
        cosine = dot(k, tl.trans(other), tl.zeros([ROWS, COLUMNS], tl.float32))
        if tl.max(tl.max(cosine, 1), 0) > threshold:
            alike = (cosine > threshold) & (i[:, None] != j[None, :])
            alike &= (i < length)[:, None] & (j < length)[None, :]
            of_i = tl.max(tl.where(alike, j[None, :], -1), 1)
            of_j = tl.max(tl.where(alike, i[:, None], -1), 0)
            tl.atomic_max(out + i, of_i, mask=of_i >= 0, sem="relaxed")
            tl.atomic_max(out + j, of_j, mask=of_j >= 0, sem="relaxed")
