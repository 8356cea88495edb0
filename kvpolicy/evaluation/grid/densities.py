"""XAttention while prefilling at its thresholds, and where it reads a forced part of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from ...pipeline import CachePipeline
from ...selection import PromptSelection, PromptView, Reads, Selection, XAttention
from .variants import FULL, Room, Variant


@attrs.frozen(kw_only=True)
class Forced(PromptSelection):
    """XAttention at a density: a tile reads this part of the blocks up to its own.

    The first and its own for certain, and the heaviest others by XAttention's masses.
    """

    density: float
    by: XAttention = attrs.field(factory=XAttention)

    @property
    def tile(self) -> int:
        return self.by.tile

    def prompt(self, view: PromptView) -> Reads:
        end = view.tiles(self.tile).stop
        kept = (heaviest(mass, self.density) for mass in self.by.masses(view))
        return Reads(torch.stack([F.pad(x, (0, end - x.shape[1])) for x in kept], 1))


def heaviest(mass: Tensor, density: float) -> Tensor:
    """Which of a tile's blocks are read, from their mass `[H, M]`; ties go to the lower one."""
    blocks = mass.shape[1]
    ranks = mass.clone()
    ranks[:, 0] = ranks[:, -1] = float("inf")
    amount = max(round(density * blocks), min(blocks, 2))
    order = ranks.sort(dim=-1, descending=True, stable=True).indices[:, :amount]
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, True)


def density_variants(
    densities: Sequence[float], thresholds: Sequence[float], window: int
) -> list[Variant]:
    """Full attention, XAttention at its thresholds, and at forced densities."""
    found = [Variant(name=FULL, family=FULL, build=lambda room: CachePipeline(window=window))]
    policies: dict[str, Selection] = {
        f"XAttention, threshold {x:.3g}": XAttention(threshold=x) for x in thresholds
    }
    policies |= {f"XAttention at {x:.0%}": Forced(density=x) for x in densities}
    found += [
        Variant(name=name, family=name, build=partial(_reading, policy, window))
        for name, policy in policies.items()
    ]
    return found


def _reading(policy: Selection, window: int, room: Room) -> CachePipeline:
    return CachePipeline(selection=policy, window=window)
