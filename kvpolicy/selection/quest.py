"""Quest: pages by an upper bound of the attention logit inside them."""

from __future__ import annotations

from typing import Literal, cast

import attrs
import torch
from torch import Tensor

from .._fields import is_a
from .._names import named
from ..budget import Tokens, tokens_from_int
from ..choices import PageGroup
from ..ops import Heads, Ops, Pages
from ._base import Selection, first_field, group_field, last_field, last_pages


def quest_tokens(value: Tokens | int) -> Tokens:
    """Tokens; an int becomes so."""
    return cast(Tokens, tokens_from_int(value))


@named
@attrs.frozen(kw_only=True)
class Quest(Selection):
    """Page selection of Quest (mit-han-lab/Quest), on admitted tokens as in WG-KV.

    A page's score is the sum over channels of max(q * min, q * max) with the page's smallest and
    largest key: no q.k inside exceeds it. `budget` counts tokens per KV head including the window,
    so `ceil((budget - window) / page_size)` pages are read besides it; the trailing page is always
    one of them (`last=1`, as the original's kernels do), only while it is partly filled
    (`last="partial"`, as WG-KV does) or as its score says (`last=0`, as the original's evaluation
    does), and so are the `first` leading pages. `group="each"` is the original's choice per query
    head. Behind an admission a page's tokens lie far apart, which loosens its bound: smaller pages
    (`attach(..., page_size=4)`) then choose better.

    Example:
        `CachePipeline(selection=Quest(budget=1024))`
    """

    budget: Tokens = attrs.field(
        converter=quest_tokens,
        validator=is_a(Tokens, "Tokens(n) or an int", lambda value: "budget=1024"),
    )
    first: int = first_field()
    last: int | Literal["partial"] = last_field(1)
    group: PageGroup = group_field()

    @property
    def extends_minmax(self) -> bool:
        return True

    def select(self, ops: Ops, pages: Pages, heads: Heads, query: Tensor, budget: int) -> Tensor:
        return ops.quest_select(
            pages, heads, query, budget, self.group, self.first, last_pages(self)
        )

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        low = keys.masked_fill(~valid[..., None], float("inf")).amin(1)
        high = keys.masked_fill(~valid[..., None], float("-inf")).amax(1)
        return torch.cat([low, high], -1)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        low, high = summary[:, :, None].float().chunk(2, -1)
        q = query[:, :, :, None].float()
        return torch.maximum(q * low, q * high).sum(-1)
