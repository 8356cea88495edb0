"""CriticalKV: scores weighed by what a token's value adds to the residual stream."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import is_a, number
from .._names import named
from ..admission import Admission, Write
from ..budget import Budget, KeepBest, budget_of
from ..choices import Accumulates, NumberGroup, When
from ..ops import Ops
from ._base import Eviction, best, wide
from ._view import EvictionView, StoredTokens
from .expected_attention import FIRST

_TOKENS = 1024  # values of a head that are projected at once


@named
@attrs.frozen(kw_only=True)
class CriticalKV(Eviction):
    """The scores of another eviction, weighed by the values' way through the output projection.

    The window and the best others, `first` of the budget in all, stay by the scores s of `eviction`
    alone. The others are scored (s + `epsilon`) x the mean over a group's query heads of
    `|W v|_1`, W being the head's part of the output projection and v the token's value.

    Feng et al., 2025 (NVIDIA/kvpress, criticalkv_press.py; FFY0/AdaKV). The authors leave `v` out
    of the inner score: `ExpectedAttention(value_norm=False)`. With `Adaptive` the first stage takes
    `first` of the mean budget from every head.

    Example:
        `CachePipeline(eviction=CriticalKV(SnapKV(budget=1024)))`
    """

    eviction: Eviction = attrs.field(kw_only=False, validator=is_a(Eviction, "an eviction"))
    epsilon: float = attrs.field(default=1e-4, validator=number("at least 0", lambda x: x >= 0))
    first: float = attrs.field(default=0.5, validator=number("from 0 to 1", lambda x: 0 <= x <= 1))

    def __attrs_post_init__(self) -> None:
        budget = budget_of(self.eviction)
        if budget is None or budget.spans_layers:
            raise ValueError(
                f"eviction: wanted one whose budget says what each layer keeps, got {budget}"
            )

    def score(self, view: EvictionView) -> Tensor:
        return self._weighed(view, self.eviction.score(view), _projected(view), best)

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        view, scores = stored.view(), self.eviction.scores(ops, stored)
        norms = ops.projected_norms(stored.pages, stored.heads, view.output_weight)
        return self._weighed(view, scores, norms, ops.keep_best)

    def _weighed(
        self, view: EvictionView, scores: Tensor, norms: Tensor, keep_best: KeepBest
    ) -> Tensor:
        budget = budget_of(self.eviction)
        assert budget is not None
        scores = scores.to(wide(scores))
        window, lengths = view.recent_valid.shape[1], view.once("lengths", view.lengths.tolist)
        wholes = [budget.tokens_per_head(n, view.layer, view.layers) for n in lengths]
        amounts = tuple(
            max(int(whole * self.first) - min(window, n), 0)
            for whole, n in zip(wholes, lengths, strict=True)
        )
        amount = view.once(("amounts", amounts), lambda: view.lengths.new_tensor(amounts))
        sure = keep_best(scores, view.valid, amount[:, None].expand(view.valid.shape[:2]))
        found = norms.mul_(scores + self.epsilon).nan_to_num_(0.0, FIRST, -FIRST)
        # What never stays, never does.
        return found.masked_fill_(sure, FIRST).masked_fill_(scores == float("-inf"), float("-inf"))

    @property
    def budget(self) -> Budget | int | None:
        return self.eviction.budget

    @property
    def window(self) -> int | None:
        return self.eviction.window

    @property
    def prefers_window(self) -> int | None:
        return self.eviction.prefers_window

    @property
    def when(self) -> When:
        return self.eviction.when

    @property
    def queries(self) -> int:
        return self.eviction.queries

    @property
    def needs(self) -> frozenset[str]:
        return self.eviction.needs

    @property
    def query_stats(self) -> bool:
        return self.eviction.query_stats

    @property
    def query_skip(self) -> int:
        return self.eviction.query_skip

    @property
    def hidden(self) -> int:
        return self.eviction.hidden

    @property
    def output_weight(self) -> bool:
        return True

    @property
    def rope(self) -> bool:
        return self.eviction.rope

    @property
    def numbered(self) -> bool:
        return self.eviction.numbered

    @property
    def accumulates(self) -> Accumulates | None:
        return self.eviction.accumulates

    @property
    def group(self) -> NumberGroup:
        return self.eviction.group

    @property
    def remembers(self) -> bool:
        return self.eviction.remembers

    @property
    def admission(self) -> Admission | None:
        return self.eviction.admission

    @property
    def forgets_window(self) -> bool:
        return self.eviction.forgets_window

    @property
    def across_heads(self) -> bool:
        return self.eviction.across_heads

    @property
    def gathers_heads(self) -> bool:
        return self.eviction.gathers_heads

    def mark(self, write: Write) -> Tensor | None:
        return self.eviction.mark(write)

    def number(self, write: Write) -> Tensor | None:
        return self.eviction.number(write)

    def admit(self, write: Write) -> Tensor | None:
        return self.eviction.admit(write)

    def at(self, layer: int) -> Eviction:
        return attrs.evolve(self, eviction=self.eviction.at(layer))

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.eviction.check(layers, kv_heads, head_dim)

    def check_window(self, window: int) -> None:
        self.eviction.check_window(window)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Eviction:
        return attrs.evolve(self, eviction=self.eviction.place(device, dtype, backend))


def _projected(view: EvictionView) -> Tensor:
    """Mean over a group's query heads of |W v|_1, `[B, Hkv, N]`; see `Ops.projected_norms`."""
    kv_heads, dtype = view.valid.shape[1], wide(view.values)
    weight = view.output_weight.to(dtype).unflatten(0, (kv_heads, -1))  # [Hkv, G, Dv, hidden]
    found = torch.zeros(view.valid.shape, dtype=dtype, device=view.valid.device)
    for row, used in enumerate(view.used):
        for head in range(kv_heads):
            parts = view.values[row, head, :used].to(dtype).split(_TOKENS)
            sums = [torch.linalg.vector_norm(x @ weight[head], 1, (0, 2)) for x in parts]
            found[row, head, :used] = torch.cat(sums) / weight.shape[1]
    return found
