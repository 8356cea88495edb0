"""Selection: which pages a decoding query reads, and which blocks a prompt's tiles do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import attrs
import torch
from torch import Tensor

from .._fields import not_negative, one_of
from .._names import named
from .._option import option
from ..budget import Tokens, budget_of, check_budget
from ..choices import PageGroup
from ..ops import Heads, Ops, Pages, TileReads
from ._prompt import PromptCall, PromptView, Reads, checked, packed

GROUPS: tuple[PageGroup, ...] = get_args(PageGroup)


class Selection(ABC):
    """Decides at read time which pages of the global cache a decoding query reads.

    A subclass is a frozen value. The window is always read. A selection frees nothing. Queries of
    prompt calls read everything, unless it has a `tile`: then `prompt` decides for them as well
    (`PromptSelection` is the base of those that decide for prompts alone).
    """

    @option
    def budget(self) -> Tokens | int | None:
        """What is read, in tokens per KV head including the window."""
        return None

    @option
    def first(self) -> int:
        """Leading pages of a head that are always among the pages read."""
        return 0

    @option
    def last(self) -> int | Literal["partial"]:
        """Trailing pages of a head that are always among the pages read; "partial": the trailing
        page as long as it is not full."""
        return 0

    @option
    def group(self) -> PageGroup:
        """How scores of the query heads of a KV head are combined: "max" or "mean", or "each"
        chooses for itself."""
        return "max"

    @option
    def neutral(self) -> bool:
        """Whether decoding queries read everything."""
        return False

    @option
    def tile(self) -> int | None:
        """Positions, a power of two, in a tile of a prompt's queries and in a block of its keys,
        for a selection that acts while prefilling; None: prompts read everything."""
        return None

    @option
    def whole_prompt(self) -> bool:
        """Whether a prompt's last queries decide for all of it, so that it comes in one call."""
        return False

    @option
    def extends_minmax(self) -> bool:
        """Whether summaries are a page's smallest and largest key, as `decode_write` extends them;
        else they are computed again when a token enters the page."""
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

    def prompt(self, view: PromptView) -> Reads:
        """What the tiles of a prompt call read, for one layer and sequence; asked if `tile` is set.

        A tile's choice may depend on its own queries, earlier ones and the keys up to its end, not
        on where the call begins or ends, unless `whole_prompt` says so; a head's on its own group.
        A tile that two calls share is decided in each by the queries that it has there. Raises
        TypeError in a selection that has a tile and does not say what it reads.
        """
        raise TypeError(f"{type(self).__name__}: wanted a method prompt(view), since it has a tile")

    def at(self, layer: int) -> Selection:
        """The policy of one layer."""
        return self

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:  # noqa: B027
        """Raises ValueError if the policy does not fit a model with these sizes."""

    def check_window(self, window: int) -> None:
        """Raises ValueError if the policy cannot read a window of so many tokens."""
        check_budget(self, window)
        tile = self.tile
        if tile is not None and (not isinstance(tile, int) or tile < 1 or tile & (tile - 1)):
            raise ValueError(f"{type(self).__name__}.tile: wanted a power of two, got {tile!r}")

    def pages(self, window: int, page_size: int) -> int:
        """The number of pages read besides the window.

        Raises ValueError for a budget that is no number of tokens.
        """
        budget = budget_of(self)
        tokens = None if budget is None else budget.fixed
        if tokens is None:
            raise ValueError(f"{type(self).__name__}.budget: wanted Tokens(n), got {budget}")
        return -(-max(tokens - window, 0) // page_size)

    def select(self, ops: Ops, pages: Pages, heads: Heads, query: Tensor, budget: int) -> Tensor:
        """The `budget` pages that queries `[B, Hq, D]` read, `[B, Hkv or Hq, budget]` int32.

        Numbers within the head in rising order, padded with -1. An op may choose without copying
        the summaries, but chooses as `score`, `group`, `first` and `last` say. Raises ValueError
        for scores of another shape.
        """
        batch, kv_heads, width = heads.table.shape
        size = pages.k.shape[1]
        column = torch.arange(width, device=query.device)
        tokens = (heads.counts[..., None] - column * size).clamp(0, size)
        grouped = query.view(batch, kv_heads, -1, query.shape[-1])
        scores = self.score(grouped, ops.read_summary(pages, heads.table), tokens)
        wanted = (batch, kv_heads, grouped.shape[2], width)
        if scores.shape != wanted:
            raise ValueError(
                f"{type(self).__name__}.score: wanted {list(wanted)}, got {list(scores.shape)}"
            )
        scores = combine_group(scores, self.group)
        return ops.top_pages(scores, heads.counts, size, budget, self.first, last_pages(self))

    def choose(self, ops: Ops, call: PromptCall) -> TileReads:
        """What the tiles of a prompt call read, for all its sequences.

        An op may choose without copying keys, but chooses as `prompt` says.
        """
        tile, name = self.tile, type(self).__name__
        assert tile is not None
        views = call.views(ops, tile)
        return packed([checked(name, self.prompt(view), view, tile) for view in views], tile)


def last_pages(policy: Selection) -> int:
    """`last` as ops take it."""
    return -1 if policy.last == "partial" else policy.last


def combine_group(scores: Tensor, group: str) -> Tensor:
    """Scores `[B, Hkv, G, M]` of query heads to `[B, Hkv, M]`, or `[B, Hq, M]` for "each"."""
    if group == "each":
        return scores.flatten(1, 2)
    if group == "max":
        return scores.amax(2)
    # One after the other: a sum over a dimension is rounded by the place in the others.
    return sum(scores.unbind(2), scores.new_zeros(())) / scores.shape[2]


@named
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


class PromptSelection(Selection):
    """A selection that acts while prefilling only: `tile` and `prompt` say how.

    Decoding reads everything; `PerPhase(prefill=..., decode=...)` adds a selection for that.
    """

    @property
    def neutral(self) -> bool:
        return True

    @property
    @abstractmethod
    def tile(self) -> int:
        """Positions, a power of two, in a tile of queries and in a block of keys."""

    @abstractmethod
    def prompt(self, view: PromptView) -> Reads:
        """What the tiles of a prompt call read; see `Selection.prompt`."""

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        return keys.new_zeros(keys.shape[0], 0)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        return query.new_zeros(*query.shape[:3], summary.shape[2])


def group_field(default: PageGroup = "max") -> Any:
    """The `group` rule of a selection."""
    return attrs.field(default=default, validator=one_of(*GROUPS))


def first_field() -> Any:
    """A number of leading pages that are always read."""
    return attrs.field(default=0, validator=not_negative)


def _last(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value != "partial":
        not_negative(instance, attribute, value)


def last_field(default: int) -> Any:
    """A number of trailing pages that are always read, or "partial"."""
    return attrs.field(default=default, validator=_last)
