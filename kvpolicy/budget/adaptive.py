"""AdaKV: heads of a layer share its tokens."""

from __future__ import annotations

from typing import get_args

import attrs
from torch import Tensor

from .._fields import fraction, one_of
from .._names import named
from ..choices import FloorForm
from ._base import KeepBest
from ._wrapper import Wrapper


@named
@attrs.frozen
class Adaptive(Wrapper):
    """AdaKV's split of a layer's tokens: the best scores of all heads win, each head has a floor.

    With n global tokens a head on average, `form` says what the floor is:
    "minimum": each head keeps its best `int(floor * n)`, the rest goes to the best remaining ones.
    "window": the same as NVIDIA/kvpress (adakv_press.py) counts, the window among the floor's
    tokens: `int(floor * (n + window)) - window`.
    "blend": the best scores of all heads are counted, c of a head, which then keeps its best
    `round((1 - floor) * c + int(floor * n))`, as AdaKV's own code does (FFY0/AdaKV,
    snapkv_utils.py); rounding may leave up to half a token a head more than n.
    """

    floor: float = attrs.field(default=0.2, validator=fraction())
    form: FloorForm = attrs.field(
        default="minimum",
        validator=one_of(*get_args(FloorForm)),
        metadata={"before": "minimum"},
    )

    @property
    def shares_heads(self) -> bool:
        return True

    @property
    def pools_heads(self) -> bool:
        return True

    def keep(
        self, scores: Tensor, valid: Tensor, target: Tensor, window: int, best: KeepBest
    ) -> Tensor:
        batch, heads, length = scores.shape

        def pooled(scores: Tensor) -> Tensor:
            """The best tokens of all heads together."""
            flat = scores.reshape(batch, 1, heads * length), valid.reshape(batch, 1, -1)
            return best(*flat, target.sum(-1, keepdim=True)).view_as(valid)

        near = window if self.form == "window" else 0
        floor = (self.floor * (target + near).double()).long() - near  # int(), as Python rounds it
        if self.form == "blend":
            counts = pooled(scores).sum(-1)
            return best(scores, valid, ((1 - self.floor) * counts.double() + floor).round().long())
        sure = best(scores, valid, floor.clamp(min=0))
        return pooled(scores.masked_fill(sure, float("inf")))
