"""SimLayerKV: layers that look at their window only keep no more."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import fraction, not_negative, positive
from .._knob import Knob
from .._names import named
from ..choices import When
from ..ops import Ops
from ._attention import attention, masses
from ._base import Eviction, when_field
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class SimLayerKV(Eviction):
    """A lazy layer keeps its first `sinks` and last `recent` tokens, another one all.

    Zhang et al., 2024 (sail-sg/SimLayerKV; NVIDIA/kvpress, simlayerkv_press.py). A layer is lazy if
    those tokens get more than `threshold` of the softmax weight of the last `observation` queries,
    the mean over all of its heads. kvpress recommends 0.9 for Llama 3, 0.65 for Llama 2, 0.8 for
    Mistral, 0.85 for Qwen.

    Example:
        `CachePipeline(eviction=SimLayerKV(threshold=0.9))`
    """

    threshold: float = attrs.field(default=0.9, validator=fraction())
    sinks: int = attrs.field(default=4, validator=not_negative)
    recent: int = attrs.field(default=1024, validator=positive)
    observation: int = attrs.field(default=1, validator=positive)
    when: When = when_field()
    across_heads = gathers_heads = True

    @property
    def queries(self) -> int:
        return self.observation

    @property
    def prefers_window(self) -> int:
        return self.observation

    def check_window(self, window: int) -> None:
        if window > self.recent:
            raise ValueError(f"recent: wanted at least the window of {window}, got {self.recent}")

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        far, near = masses(ops, stored, self.observation)
        return self._scores(stored.view(), far.double(), near.double().sum(2))

    def score(self, view: EvictionView) -> Tensor:
        far = torch.zeros(view.valid.shape, dtype=torch.float64, device=view.valid.device)
        near = far.new_zeros(far.shape[:2])
        for row, used in enumerate(view.used):
            weights = attention(view, row, used).double()
            far[row, :, :used] = weights[..., :used].sum((1, 2))
            near[row] = weights[..., used:].sum((1, 2, 3))
        return self._scores(view, far, near)

    def _scores(self, view: EvictionView, far: Tensor, inside: Tensor) -> Tensor:
        """From weights of the stored tokens `[B, Hkv, N]` and sums of the window's `[B, Hkv]`."""
        near = view.positions >= view.lengths[:, None, None] - self.recent
        held = ((view.positions < self.sinks) | near) & view.valid
        sums = []
        for row, used in enumerate(view.used):
            own = far[row, :, :used]
            seen = inside[row] + own.masked_fill(~held[row, :, :used], 0).sum(1)
            sums.append(torch.stack([seen, inside[row] + own.sum(1)], -1))
        seen, total = view.across(torch.stack(sums)).sum(1).unbind(-1)  # [B]
        lazy = (seen > self.threshold * total)[:, None, None]
        found = torch.zeros(view.valid.shape, device=view.valid.device)
        return found.masked_fill(lazy & ~held, float("-inf"))

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        return Knob(
            name="threshold",
            at=lambda x: x,
            set=lambda value: attrs.evolve(self, threshold=value),
        )
