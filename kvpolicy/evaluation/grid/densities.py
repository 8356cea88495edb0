"""XAttention while prefilling: what part of the blocks it reads, and what a forced part does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import Ops, TileReads, tile_spans
from ...pipeline import CachePipeline
from ...selection import PromptCall, PromptSelection, PromptView, Reads, XAttention
from .variants import FULL, Room, Variant

DENSITY = "density"  # the score that says which part of the blocks was read


@attrs.define
class Tally:
    """Blocks that tiles read, and those that they might have read."""

    read: int = 0
    seen: int = 0

    @property
    def density(self) -> float:
        """The part that was read, of everything where nothing was asked."""
        return self.read / self.seen if self.seen else 1.0


@attrs.frozen(kw_only=True)
class Watched(PromptSelection):
    """XAttention that counts what it reads; at a forced `density` if one is given.

    Then a tile reads its first and own block and the heaviest others by the same masses, until it
    reads that part of the blocks up to its own, or the nearest number of them.
    """

    selection: XAttention
    density: float | None = None
    tally: Tally = attrs.field(factory=Tally, eq=False, repr=False)

    @property
    def tile(self) -> int:
        return self.selection.tile

    def prompt(self, view: PromptView) -> Reads:
        if self.density is None:
            return self.selection.prompt(view)
        end = view.tiles(self.tile).stop
        kept = (heaviest(mass, self.density) for mass in self.selection.masses(view))
        return Reads(torch.stack([F.pad(x, (0, end - x.shape[1])) for x in kept], 1))

    def choose(self, ops: Ops, call: PromptCall) -> TileReads:
        if self.density is None:
            reads = self.selection.choose(ops, call)
        else:
            reads = super().choose(ops, call)
        tiles = [n for span in tile_spans(call.segments, self.tile) for n in range(*span)]
        self.tally.seen += reads.blocks.shape[0] * sum(n + 1 for n in tiles)
        self.tally.read += int(reads.blocks.sum())
        return reads


def heaviest(mass: Tensor, density: float) -> Tensor:
    """Which of a tile's blocks are read, from their mass `[H, M]`; ties go to the lower one."""
    blocks = mass.shape[1]
    ranks = mass.clone()
    ranks[:, 0] = ranks[:, -1] = float("inf")
    amount = max(round(density * blocks), min(blocks, 2))
    order = ranks.sort(dim=-1, descending=True, stable=True).indices[:, :amount]
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, True)


def density_variants(densities: Sequence[float], thresholds: Sequence[float], window: int) -> (
    list[Variant]
):  # fmt: skip
    """Full attention, XAttention at its thresholds, and at forced densities."""
    found = [Variant(name=FULL, family=FULL, build=lambda room: CachePipeline(window=window))]
    for threshold in thresholds:
        name = f"XAttention, threshold {threshold:.3g}"
        found.append(_variant(name, XAttention(threshold=threshold), None, window))
    for density in densities:
        found.append(_variant(f"XAttention at {density:.0%}", XAttention(), density, window))
    return found


def _variant(name: str, policy: XAttention, density: float | None, window: int) -> Variant:
    def build(room: Room) -> CachePipeline:
        return CachePipeline(selection=Watched(selection=policy, density=density), window=window)

    return Variant(name=name, family=name, build=build)


def with_density(
    scores: Mapping[str, tuple[float, ...]], pipeline: CachePipeline
) -> Mapping[str, tuple[float, ...]]:
    """The scores of a cell, with the density where its selection was watched."""
    if not isinstance(pipeline.selection, Watched):
        return scores
    return {**scores, DENSITY: (pipeline.selection.tally.density,)}
