"""One selection while prefilling, another while decoding."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from torch import Tensor

from .._fields import is_a
from .._names import named
from ..budget import Tokens
from ..choices import PageGroup
from ..ops import Heads, Ops, Pages, TileReads
from ._base import SelectAll, Selection
from ._prompt import PromptCall, PromptView, Reads


def _selection() -> Any:
    return attrs.field(factory=SelectAll, validator=is_a(Selection, "a selection"))


@named
@attrs.frozen(kw_only=True)
class PerPhase(Selection):
    """Reads prompts as one selection says and decodes as another does; by default everything.

    `prefill` is asked for prompt calls alone, `decode` for decode calls alone.

    Example:
        `PerPhase(prefill=XAttention(), decode=Quest(budget=1024))`
    """

    prefill: Selection = _selection()
    decode: Selection = _selection()

    @property
    def budget(self) -> Tokens | int | None:
        return self.decode.budget

    @property
    def first(self) -> int:
        return self.decode.first

    @property
    def last(self) -> int | Literal["partial"]:
        return self.decode.last

    @property
    def group(self) -> PageGroup:
        return self.decode.group

    @property
    def neutral(self) -> bool:
        return self.decode.neutral

    @property
    def extends_minmax(self) -> bool:
        return self.decode.extends_minmax

    @property
    def tile(self) -> int | None:
        return self.prefill.tile

    @property
    def whole_prompt(self) -> bool:
        return self.prefill.whole_prompt

    def at(self, layer: int) -> Selection:
        parts = self.prefill.at(layer), self.decode.at(layer)
        return PerPhase(prefill=parts[0], decode=parts[1])

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        for policy in (self.prefill, self.decode):
            policy.check(layers, kv_heads, head_dim)

    def check_window(self, window: int) -> None:
        for policy in (self.prefill, self.decode):
            policy.check_window(window)

    def pages(self, window: int, page_size: int) -> int:
        return self.decode.pages(window, page_size)

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        return self.decode.summarize(keys, valid)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        return self.decode.score(query, summary, counts)

    def select(self, ops: Ops, pages: Pages, heads: Heads, query: Tensor, budget: int) -> Tensor:
        return self.decode.select(ops, pages, heads, query, budget)

    def prompt(self, view: PromptView) -> Reads:
        return self.prefill.prompt(view)

    def choose(self, ops: Ops, call: PromptCall) -> TileReads:
        return self.prefill.choose(ops, call)
