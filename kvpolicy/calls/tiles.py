"""Choosing what the tiles of a prompt call read."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..ops import TileReads, tile_spans
from ..selection import PromptCall
from ..store.layer import LayerStore
from ..store.state import CacheState, Told


def choose_tiles(
    state: CacheState, layer: LayerStore, query: Tensor, told: Told
) -> TileReads | None:
    """What tiles of queries `[Hq, T, D]` read of a layer, or None for everything."""
    policy, seg, sizes = layer.selection, told.segments, layer.sizes
    if policy.tile is None or layer.slides:
        return None
    ends = (at + b - a for at, (a, b) in zip(seg.start, pairwise(seg.cu_q), strict=True))
    if max(ends) <= layer.window:
        return None
    call = PromptCall(
        layer.index, state.spec.head_ids, query, told.key, told.flags, seg, layer.pool.pages,
        layer.heads, told.bounds, sizes.scale, sizes.softcap,
    )  # fmt: skip
    return policy.choose(state.ops, call)


def count_blocks(reads: TileReads, told: Told) -> Tensor:
    """Blocks that tiles read and those that there were, float64 `[2]`; the host does not wait.

    A column outside the blocks read counts as a part of one.
    """
    device, tile = reads.blocks.device, reads.tile
    spans = tile_spans(told.segments, tile)
    ends = [n + 1 for low, high in spans for n in range(low, high)]  # blocks up to each tile
    chosen = reads.blocks.sum(dtype=torch.float64)
    if reads.columns is not None and reads.sets is not None:
        last = torch.tensor(ends, device=device) - 1
        for rows in torch.arange(len(ends), device=device).split(256):
            at = reads.columns[:, reads.sets[rows].long()].long()  # [Hs, n, K]
            block = at // tile
            alone = block < last[rows][:, None]
            within = block.clamp(max=reads.blocks.shape[2] - 1)
            alone &= ~reads.blocks[:, rows].gather(2, within)
            chosen = chosen + alone.sum(dtype=torch.float64) / tile
    there = chosen.new_tensor(float(sum(ends) * reads.blocks.shape[0]))
    return torch.stack([chosen, there])
