"""What a selection that acts while prefilling is told, and what it answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._fields import shown
from ..ops import Bounds, Heads, Ops, Pages, Segments, TileReads, tile_span, tile_spans

_NOWHERE = 1 << 30  # a position beyond every sequence


class PromptView(NamedTuple):
    """One layer and sequence of a prompt call.

    `query` `[Hq, T, D]` are the call's queries, at positions `start`, `start + 1`, ...; `keys`
    `[Hkv, start + T, D]` those of the sequence by position, after RoPE, and `present` bool
    `[Hkv, start + T]` says which are there: tokens that were not admitted or have been evicted are
    absent, their keys zeros. `heads` are the global ids of the KV heads, `layer` counts from 0.
    `scale` multiplies q.k, `softcap` (or None) bounds the product.
    """

    layer: int
    heads: range
    query: Tensor
    start: int
    keys: Tensor
    present: Tensor
    scale: float
    softcap: float | None = None

    def tiles(self, tile: int) -> range:
        """The tiles of `tile` positions that hold the queries."""
        return range(*tile_span(self.start, self.query.shape[1], tile))


class Reads(NamedTuple):
    """What the tiles of a `PromptView` read besides the window.

    `blocks` bool `[Hs, N, M]`: whether the n-th of `view.tiles(tile)` reads block m (the keys at `m
    * tile` and on), for Hs = Hkv heads or each of the Hq query heads; M blocks reach as far as the
    queries. `columns` (or None) are single positions, integers `[Hs, C, K]` in any order, -1 for
    none, with C = 1 for all tiles or C = N. Keys after a query are hidden from it in any case.
    """

    blocks: Tensor
    columns: Tensor | None = None


class PromptCall(NamedTuple):
    """A layer of a prompt call, as ops take it (see `kvpolicy.ops.Ops.prefill_attention`)."""

    layer: int
    head_ids: range
    query: Tensor
    key: Tensor
    flags: Tensor
    segments: Segments
    pages: Pages
    heads: Heads
    bounds: Bounds | None
    scale: float
    softcap: float | None

    def keys_at(self, ops: Ops, tile: int) -> tuple[Tensor, Tensor]:
        """See `kvpolicy.ops.Ops.keys_at`."""
        return ops.keys_at(
            self.key, self.flags, self.segments, self.pages, self.heads, tile, self.bounds
        )

    def views(self, ops: Ops, tile: int) -> list[PromptView]:
        """The call's sequences that have queries."""
        keys, present = self.keys_at(ops, tile)
        found, base, seg = [], 0, self.segments
        for start, q0, q1, (_, stop) in zip(
            seg.start, seg.cu_q, seg.cu_q[1:], tile_spans(seg, tile), strict=False
        ):
            if q0 < q1:
                own = slice(base, base + start + q1 - q0)
                found.append(
                    PromptView(
                        self.layer,
                        self.head_ids,
                        self.query[:, q0:q1],
                        start,
                        keys[:, own],
                        present[:, own],
                        self.scale,
                        self.softcap,
                    )  # fmt: skip
                )
            base += stop * tile
        return found


def checked(name: str, reads: Reads, view: PromptView, tile: int) -> Reads:
    """`reads` without blocks that lie after a tile.

    Raises ValueError or TypeError, naming the policy, if they do not fit the view.
    """
    tiles = view.tiles(tile)
    heads = {view.keys.shape[0], view.query.shape[0]}
    wanted = f"{name}.prompt: wanted blocks, bools [{' or '.join(map(str, sorted(heads)))}, "
    wanted += f"{len(tiles)}, {tiles.stop}]"
    if not isinstance(reads, Reads) or not isinstance(reads.blocks, Tensor):
        raise TypeError(f"{wanted} in Reads, got {type(reads).__name__}")
    blocks, columns = reads
    shape = tuple(blocks.shape)
    if blocks.dtype != torch.bool or shape[1:] != (len(tiles), tiles.stop) or shape[0] not in heads:
        raise ValueError(f"{wanted}, got {blocks.dtype} {list(shape)}")
    if columns is not None:
        fits = isinstance(columns, Tensor) and columns.ndim == 3
        fits = fits and not (columns.dtype.is_floating_point or columns.dtype == torch.bool)
        if not fits or columns.shape[0] != shape[0] or columns.shape[1] not in (1, len(tiles)):
            wanted = f"integers [{shape[0]}, 1 or {len(tiles)}, K]"
            got = shown(columns)
            raise ValueError(f"{name}.prompt: wanted columns, {wanted}, got {got}")
    block = torch.arange(tiles.stop, device=blocks.device)
    return Reads(blocks & (block <= block[tiles.start :, None]), columns)


def packed(found: list[Reads], tile: int) -> TileReads:
    """The reads of a call's sequences, as ops take them."""
    heads = max(x.blocks.shape[0] for x in found)
    width = max(x.blocks.shape[2] for x in found)
    blocks = torch.cat([pad(_spread(x, heads), (0, width - x.shape[2])) for x, _ in found], 1)
    each = [x.columns for x in found]
    most = max((x.shape[2] for x in each if x is not None), default=0)
    if not most:
        return TileReads(tile, blocks)
    lists: list[Tensor] = []
    sets: list[int] = []
    at = 0
    for own, columns in found:
        tiles = own.shape[1]
        if columns is None:
            columns = own.new_full((heads, 1, 0), -1, dtype=torch.int32)
        columns = _spread(columns, heads).int()
        lists.append(_columns(pad(columns, (0, most - columns.shape[2]), value=-1)))
        sets += [at] * tiles if columns.shape[1] == 1 else range(at, at + tiles)
        at += columns.shape[1]
    numbers = torch.tensor(sets, dtype=torch.int32).to(blocks.device, non_blocking=True)
    return TileReads(tile, blocks, torch.cat(lists, 1), numbers)


def _columns(x: Tensor) -> Tensor:
    """Columns `[..., K]` rising, each once, padded with positions beyond every sequence."""
    rising = x.masked_fill(x < 0, _NOWHERE).sort(-1).values
    twice = pad(rising[..., 1:] == rising[..., :-1], (1, 0), value=False)
    return rising.masked_fill(twice, _NOWHERE).sort(-1).values


def _spread(x: Tensor, heads: int) -> Tensor:
    """A choice of KV heads for each of their query heads, where another sequence chose so."""
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)
