"""CriticalKV: scores weighed by what a token's value adds to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from .._fields import is_a, number
from .._names import named
from ..admission import Admission, Write
from ..budget import Budget, budget_of
from ..choices import Accumulates, NumberGroup, When
from ..ops import Ops
from ._base import Eviction, wide
from ._view import EvictionView, StoredTokens
from .expected_attention import FIRST

_TOKENS = 4096  # values of a head that are projected at once, in whole pages
Values = Callable[[int, int, slice], Tensor]  # of tokens of a sequence and KV head: `[n, Dv]`


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
        def values(row: int, head: int, part: slice) -> Tensor:
            return view.values[row, head, part]

        return self._weighed(view, self.eviction.score(view), values)

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        def values(row: int, head: int, part: slice) -> Tensor:
            return stored.read(ops, row, slice(head, head + 1), part)[1][0]

        return self._weighed(stored.view(), self.eviction.scores(ops, stored), values)

    def _weighed(self, view: EvictionView, scores: Tensor, values: Values) -> Tensor:
        budget = budget_of(self.eviction)
        assert budget is not None
        scores = scores.to(wide(scores)).masked_fill(~view.valid, float("-inf"))
        found = torch.zeros_like(scores)
        window = view.recent_keys.shape[2]
        lengths = view.lengths.tolist()
        for row, used in enumerate(view.used):
            own = scores[row, :, :used]
            whole = budget.tokens_per_head(lengths[row], view.layer, view.layers)
            amount = max(int(whole * self.first) - min(window, lengths[row]), 0)
            best = _best(own, min(amount, used))
            weighed = (own + self.epsilon) * _projected(view, row, used, values)
            weighed = torch.where(own > float("-inf"), weighed, own).nan_to_num(0.0, FIRST, -FIRST)
            # What never stays, never does.
            weighed = weighed.masked_fill(own == float("-inf"), float("-inf"))
            found[row, :, :used] = torch.where(best & (own > float("-inf")), FIRST, weighed)
        return found

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


def _best(scores: Tensor, amount: int) -> Tensor:
    """The `amount` best of each head, bool `[Hkv, N]`; ties to the later token."""
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    found = torch.zeros_like(scores, dtype=torch.bool)
    return found.scatter_(-1, order[:, :amount], True).flip(-1)


def _projected(view: EvictionView, row: int, used: int, values: Values) -> Tensor:
    """Mean over a group's query heads of |W v|_1, `[Hkv, used]`."""
    kv_heads = view.valid.shape[1]
    weight = view.output_weight.unflatten(0, (kv_heads, -1))  # [Hkv, G, Dv, hidden]
    dtype = wide(view.recent_values)
    found = torch.empty(kv_heads, used, dtype=dtype, device=view.valid.device)
    for head in range(kv_heads):
        for low in range(0, used, _TOKENS):
            own = values(row, head, slice(low, min(low + _TOKENS, used))).to(weight.dtype)
            sizes = [(own @ w).abs().sum(-1, dtype=dtype) for w in weight[head]]
            found[head, low : low + len(own)] = torch.stack(sizes).mean(0)
    return found
