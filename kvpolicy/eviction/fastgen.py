"""FastGen: a policy for each head by what its attention map shows."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import fraction, not_negative, positive
from .._knob import Knob
from .._names import named
from ..budget import KeepBest
from ..choices import When
from ..ops import Ops
from ._attention import dense_masses, masses, sums
from ._base import Eviction, best, when_field
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class FastGen(Eviction):
    """Each head keeps the first of these sets that recovers enough of its attention.

    Ge et al., 2024, Model Tells You What to Discard. In this order: the first `sinks` tokens; with
    the `frequent` part of its tokens that get most attention; with the `local` part of those seen
    last; all. Enough is a share `recovery` of the softmax weight of the last `observation` queries,
    the mean over the group. The window is in every set. The paper profiles the whole prompt and
    also has a set of punctuation, which keys and positions do not show: tokens' ids never reach a
    policy.

    Example:
        `CachePipeline(eviction=FastGen(recovery=0.95))`
    """

    recovery: float = attrs.field(default=0.95, validator=fraction())
    frequent: float = attrs.field(default=0.3, validator=fraction())
    local: float = attrs.field(default=0.3, validator=fraction())
    sinks: int = attrs.field(default=4, validator=not_negative)
    observation: int = attrs.field(default=64, validator=positive)
    when: When = when_field()

    @property
    def queries(self) -> int:
        return self.observation

    @property
    def prefers_window(self) -> int:
        return self.observation

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        return self._scores(stored.view(), *masses(ops, stored, self.observation), ops.keep_best)

    def score(self, view: EvictionView) -> Tensor:
        return self._scores(view, *dense_masses(view), best)

    def _scores(self, view: EvictionView, far: Tensor, near: Tensor, keep_best: KeepBest) -> Tensor:
        """From weights of the stored tokens `[B, Hkv, N]` and sums of the window's `[B, Hkv]`."""
        late = view.once(("FastGen", self.local), lambda: self._late(view.lengths))
        first = view.positions < self.sinks
        amount = (self.frequent * view.valid.sum(-1)).long()
        frequent = first | keep_best(far, view.valid, amount)
        sets = torch.stack([first, frequent, frequent | (view.positions >= late), view.valid])
        held = sums(view, far * sets) + near  # [4, B, Hkv]
        # Each set holds the one before: as many as are enough are so from the last one on.
        enough = (held[:3] >= self.recovery * held[3]).sum(0)
        found = torch.zeros(view.valid.shape, device=view.valid.device)
        return found.masked_fill_(sets[:3].sum(0) < enough[..., None], float("-inf"))

    def _late(self, lengths: Tensor) -> Tensor:
        """The first position `[B, 1, 1]` of the `local` part of the tokens seen last."""
        late = lengths - (lengths.double() * self.local).long()
        return late[:, None, None]

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        return Knob(
            name="recovery",
            at=lambda x: x,
            set=lambda value: attrs.evolve(self, recovery=value),
        )
