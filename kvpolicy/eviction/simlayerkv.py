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
from ._attention import dense_masses, masses, sums
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
        return self._scores(stored.view(), *masses(ops, stored, self.observation))

    def score(self, view: EvictionView) -> Tensor:
        return self._scores(view, *dense_masses(view))

    def _scores(self, view: EvictionView, far: Tensor, inside: Tensor) -> Tensor:
        """From weights of the stored tokens `[B, Hkv, N]` and sums of the window's `[B, Hkv]`."""
        recent = view.once(
            ("SimLayerKV", self.recent), lambda: view.lengths[:, None, None] - self.recent
        )
        held = (view.positions < self.sinks) | (view.positions >= recent)
        both = sums(view, far * torch.stack([held, view.valid])) + inside  # [2, B, Hkv]
        seen, total = view.across(both.movedim(0, -1)).sum(1).unbind(-1)  # [B]
        lazy = (seen > self.threshold * total)[:, None, None]
        found = torch.zeros(view.valid.shape, device=view.valid.device)
        return found.masked_fill_(held < lazy, float("-inf"))  # not held, and the layer is lazy

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        return Knob(
            name="threshold",
            at=lambda x: x,
            set=lambda value: attrs.evolve(self, threshold=value),
        )
