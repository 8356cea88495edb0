"""DBudgetKV: as many tokens as the norm of the attention map asks for."""

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
class DBudgetKV(Eviction):
    """Drops tokens, the least by rank first, until the attention map would lose too much norm.

    Ni et al., 2025 (arXiv 2502.16886; no code was published). Ranks are positions: the first
    `sinks` tokens, then the newest before the older ones. Of a head's map A, the rows of the last
    `observation` queries of its group, as many columns stay as it takes for their Frobenius norm to
    be at least `(1 - threshold) |A|`. There is no budget: each head finds its own. The paper looks
    at whole maps, which are never formed here.

    Example:
        `CachePipeline(eviction=DBudgetKV(threshold=0.01))`
    """

    threshold: float = attrs.field(default=0.01, validator=fraction())
    sinks: int = attrs.field(default=4, validator=not_negative)
    observation: int = attrs.field(default=32, validator=positive)
    when: When = when_field()

    @property
    def queries(self) -> int:
        return self.observation

    @property
    def prefers_window(self) -> int:
        return self.observation

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        found = masses(ops, stored, self.observation, squared=True)
        return self._scores(stored.view(), *found)

    def score(self, view: EvictionView) -> Tensor:
        return self._scores(view, *dense_masses(view, squared=True))

    def _scores(self, view: EvictionView, far: Tensor, near: Tensor) -> Tensor:
        """From squares of the stored columns `[B, Hkv, N]` and sums of the window's `[B, Hkv]`."""
        sink = view.positions < self.sinks
        others = far.masked_fill(sink, 0)
        # The square of a norm that is a part 1 - t less than another is 1 - t (2 - t) of its.
        spare = (sums(view, far) + near) * (self.threshold * (2 - self.threshold))
        found = torch.zeros(view.valid.shape, device=view.valid.device)
        for row, used in enumerate(view.used):
            gone = others[row, :, :used].cumsum(-1, dtype=torch.float64)  # with all older columns
            drop = (gone <= spare[row, :, None]).logical_and_(~sink[row, :, :used])
            found[row, :, :used].masked_fill_(drop, float("-inf"))
        return found

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        return Knob(
            name="threshold",
            at=lambda x: 1 - x,
            set=lambda value: attrs.evolve(self, threshold=value),
        )
