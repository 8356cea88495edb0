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
from ._attention import attention, masses
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
        view = stored.view()
        far, near = masses(ops, stored, self.observation, squared=True)
        found = torch.full(view.valid.shape, float("-inf"), device=view.valid.device)
        for row, used in enumerate(view.used):
            stays = self._stays(view, row, far[row, :, :used].double(), near[row].double())
            found[row, :, :used].masked_fill_(stays, 0.0)
        return found

    def score(self, view: EvictionView) -> Tensor:
        found = torch.full(view.valid.shape, float("-inf"), device=view.valid.device)
        for row, used in enumerate(view.used):
            squares = attention(view, row, used).double().square().sum((1, 2))  # [Hkv, used + W]
            stays = self._stays(view, row, squares[:, :used], squares[:, used:])
            found[row, :, :used].masked_fill_(stays, 0.0)
        return found

    def _stays(self, view: EvictionView, row: int, far: Tensor, near: Tensor) -> Tensor:
        """Which of a sequence's first slots stay, bool `[Hkv, used]`.

        From squares of their columns `far` `[Hkv, used]`, and of those of the window `near`.
        """
        used = far.shape[1]
        sink = (view.positions[row, :, :used] < self.sinks) & view.valid[row, :, :used]
        sure = near.sum(-1)
        wanted = (1 - self.threshold) ** 2 * (far.sum(-1) + sure)
        sure = sure + far.masked_fill(~sink, 0).sum(-1)
        others = far.masked_fill(sink, 0)
        newer = others.flip(-1).cumsum(-1).flip(-1) - others  # what all newer columns hold
        return sink | ((sure[:, None] + newer < wanted[:, None]) & view.valid[row, :, :used])

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        return Knob(
            name="threshold",
            at=lambda x: 1 - x,
            set=lambda value: attrs.evolve(self, threshold=value),
        )
