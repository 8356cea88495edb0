"""A budget that all layers share, by their scores."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import fraction
from .._names import named
from ._base import BudgetView, Counts
from ._wrapper import Wrapper


@named
@attrs.frozen
class AcrossLayers(Wrapper):
    """The best scores of all heads of all layers win, `base` on average; each head has a floor.

    AdaKV's rule over layers too, and so DynamicKV's layer budgets (Zhou et al., 2024) without its
    intermediate rounds: each head first keeps its best `int(floor * n)` of the n global tokens that
    `base` leaves it, the best of all others share the rest. For scores that mean the same in every
    layer, such as softmax weights.
    """

    floor: float = attrs.field(default=0.2, validator=fraction())

    @property
    def shares_heads(self) -> bool:
        return True

    @property
    def spans_layers(self) -> bool:
        return True

    @property
    def reads_scores(self) -> bool:
        return True

    def targets(self, view: BudgetView) -> Counts:
        means = self.base.targets(view)
        return [self._row(view, row, mean) for row, mean in enumerate(means)]

    def _row(self, view: BudgetView, row: int, mean: list[list[int]]) -> list[list[int]]:
        """Global tokens `[layer][head]` of one sequence."""
        parts: list[Tensor] = []
        for layer, heads in zip(view.scores, mean, strict=True):
            ordered = layer[row].sort(-1, descending=True).values  # [Hkv, N]
            floor = torch.tensor([int(self.floor * n) for n in heads], device=ordered.device)
            sure = torch.arange(ordered.shape[1], device=ordered.device) < floor[:, None]
            sure &= ordered > float("-inf")
            parts += ordered.masked_fill(sure, float("inf")).to(view.scores[0].device).unbind(0)
        flat = torch.cat(parts)
        owner = torch.arange(len(parts), device=flat.device).repeat_interleave(
            torch.tensor([len(x) for x in parts], device=flat.device)
        )
        # Padding is never among the best, however wide; equal scores go to earlier layers.
        best = flat.argsort(dim=0, descending=True, stable=True)[: sum(map(sum, mean))]
        best = best[flat[best] > float("-inf")]
        counts = torch.bincount(owner[best], minlength=len(parts)).tolist()
        found, used = [], 0
        for heads in mean:
            found.append(counts[used : used + len(heads)])
            used += len(heads)
        return found
