"""H2O: keep the heavy hitters, tokens that gathered most attention so far."""

from __future__ import annotations

from typing import get_args

import attrs
from torch import Tensor

from .._fields import flag, one_of
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import Accumulates, NumberGroup, When
from ._base import Eviction, when_field
from ._view import EvictionView


@named
@attrs.frozen(kw_only=True)
class H2O(Eviction):
    """Keeps the tokens with the largest accumulated attention.

    The score of a token is the sum over all queries since it was written, prompt and decoded ones
    alike, of the softmax weight that they gave it (Zhang et al. 2023, arXiv 2306.14048;
    FMInference/H2O, h2o_hf/utils_real_drop/modify_llama.py). The original keeps a budget of heavy
    hitters and one of recent tokens, by default of equal size: here the recent ones are the
    pipeline's window, and `budget` counts both. It drops a token a step, a pipeline every
    `interval` steps; `when="prompt_end"` drops once. Query heads that share a KV head are combined
    by `group`, which models of that time did not have. `average` divides the sum by the number of
    queries that could see the token: kvpress's ObservedAttentionPress.

    Example:
        `CachePipeline(eviction=H2O(budget=1024), window=512)`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field(default="decode")
    group: NumberGroup = attrs.field(default="mean", validator=one_of(*get_args(NumberGroup)))
    average: bool = attrs.field(default=False, validator=flag)

    @property
    def accumulates(self) -> Accumulates:
        return "sum"

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        if not self.average:
            return view.numbers
        return view.numbers / (view.lengths[:, None, None] - view.positions)
