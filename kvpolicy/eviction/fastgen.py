"""FastGen: a policy for each head by what its attention map shows."""

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
        view = stored.view()
        far, near = masses(ops, stored, self.observation)
        found = torch.full(view.valid.shape, float("-inf"), device=view.valid.device)
        for row, used in enumerate(view.used):
            mass = far[row, :, :used].double() / view.group
            stays = self._stays(view, row, mass, near[row].double().sum(-1) / view.group)
            found[row, :, :used].masked_fill_(stays, 0.0)
        return found

    def score(self, view: EvictionView) -> Tensor:
        found = torch.full(view.valid.shape, float("-inf"), device=view.valid.device)
        for row, used in enumerate(view.used):
            weights = attention(view, row, used).double().mean(1).sum(1)  # [Hkv, used + W]
            stays = self._stays(view, row, weights[:, :used], weights[:, used:].sum(-1))
            found[row, :, :used].masked_fill_(stays, 0.0)
        return found

    def _stays(self, view: EvictionView, row: int, mass: Tensor, near: Tensor) -> Tensor:
        """Which of a sequence's first slots stay, bool `[Hkv, used]`.

        From their weights `mass` `[Hkv, used]` and the sum of the window's `near` `[Hkv]`.
        """
        used, valid = mass.shape[1], view.valid[row, :, : mass.shape[1]]
        place = view.positions[row, :, :used]
        count = valid.sum(-1, keepdim=True)
        # Ranks by attention, ties to the later token.
        order = mass.masked_fill(~valid, -1).flip(-1).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, used - 1 - order, torch.arange(
            used, device=order.device
        ).expand_as(order))  # fmt: skip
        sets = [place < self.sinks]
        sets.append(sets[-1] | (rank < (self.frequent * count).long()))
        sets.append(sets[-1] | (place >= view.lengths[row] - int(self.local * view.lengths[row])))
        stays, wanted = valid, self.recovery * (mass.sum(-1) + near)
        for held in reversed(sets):
            enough = near + mass.masked_fill(~held, 0).sum(-1) >= wanted
            stays = torch.where(enough[:, None], held & valid, stays)
        return stays

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        return Knob(
            name="recovery",
            at=lambda x: x,
            set=lambda value: attrs.evolve(self, recovery=value),
        )
