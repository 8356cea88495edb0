"""Layers that look at their window only give their tokens to the others."""

from __future__ import annotations

import attrs
from torch import Tensor

from .._fields import fraction, not_negative
from .._names import named
from ._base import BudgetView, Counts
from ._wrapper import Wrapper


@named
@attrs.frozen
class LazyLayers(Wrapper):
    """SimLayerKV's rule as a split: lazy layers hold `held` global tokens a head, `base` the mean.

    A layer is lazy if what its scores give to all global tokens, the mean over heads of their sum,
    is less than 1 - `threshold`: scores that are shares of softmax weight, such as SnapKV's, TOVA's
    and SAGE-KV's, with the window's left out. What lazy layers give up the others share equally;
    where all layers are lazy, or none is, each has its own.
    """

    threshold: float = attrs.field(default=0.9, validator=fraction())
    held: int = attrs.field(default=4, validator=not_negative)

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
        shares = [_shares(layer) for layer in view.scores]  # [layer][row]
        found = []
        for row, mean in enumerate(self.base.targets(view)):
            lazy = [share[row] < 1 - self.threshold for share in shares]
            busy = sum(len(heads) for heads, idle in zip(mean, lazy, strict=True) if not idle)
            if not busy:
                found.append(mean)
                continue
            least = [[min(n, self.held) for n in heads] for heads in mean]
            spare = sum(sum(a) - sum(b) for a, b, x in zip(mean, least, lazy, strict=True) if x)
            found.append(
                [
                    few if idle else [n + spare // busy for n in heads]
                    for heads, few, idle in zip(mean, least, lazy, strict=True)
                ]
            )
        return found


def _shares(scores: Tensor) -> list[float]:
    """The mean over heads of the sum of scores `[B, Hkv, N]`; in float64, whatever the padding."""
    kept = scores.double().masked_fill(scores == float("-inf"), 0.0)
    found: list[float] = kept.sum(-1).mean(-1).tolist()
    return found
