"""Selection: which pages a decoding query reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import attrs
from torch import Tensor

from .._validate import not_negative, one_of
from ..budget import Tokens

GROUPS = ("max", "mean", "each")


class Selection(ABC):
    """Decides at read time which pages of the global cache a decoding query reads.

    The window is always read. `budget` is in tokens per KV head including the window; `first` and
    `last` pages of a head are always among the pages read. `group` combines the scores of the query
    heads that share a KV head ("max" or "mean"), or lets "each" choose for itself. A selection
    frees nothing and is applied to decode calls only.
    """

    budget: Tokens | None = None
    first: int = 0
    last: int = 0
    group: str = "max"
    fused: str | None = None  # name of the op that does summary, score and choice in one

    @property
    def neutral(self) -> bool:
        """Whether everything is read."""
        return False

    @abstractmethod
    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Page summaries `[N, S]` from keys `[N, P, D]` and valid `[N, P]`; a pure function."""

    @abstractmethod
    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        """Scores `[B, Hkv, G, M]` of pages; higher is read first.

        `query` `[B, Hkv, G, D]`, `summary` `[B, Hkv, M, S]`, `counts` `[B, Hkv, M]` tokens in each
        page.
        """

    def at(self, layer: int) -> Selection:
        """The policy of one layer."""
        return self

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:  # noqa: B027
        """Raises ValueError if the policy does not fit a model with these sizes."""

    def pages(self, window: int, page_size: int) -> int:
        """The number of pages read besides the window."""
        if self.budget is None:
            raise ValueError(f"{type(self).__name__}.budget: wanted Tokens(n), got None")
        return -(-max(self.budget.tokens - window, 0) // page_size)


def combine_group(scores: Tensor, group: str) -> Tensor:
    """Scores `[B, Hkv, G, M]` of query heads to `[B, Hkv, M]`, or `[B, Hq, M]` for "each"."""
    if group == "each":
        return scores.flatten(1, 2)
    if group == "max":
        return scores.amax(2)
    # One after the other: a sum over a dimension is rounded by the place in the others.
    return sum(scores.unbind(2), scores.new_zeros(())) / scores.shape[2]


@attrs.frozen(kw_only=True)
class SelectAll(Selection):
    """Reads every page: the neutral selection."""

    @property
    def neutral(self) -> bool:
        return True

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        return keys.new_zeros(keys.shape[0], 0)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        return query.new_zeros(*query.shape[:3], summary.shape[2])


def group_field() -> Any:
    """The `group` rule of a selection."""
    return attrs.field(default="max", validator=one_of(*GROUPS))


def pages_field(default: int) -> Any:
    """A number of always-kept pages."""
    return attrs.field(default=default, validator=not_negative)
