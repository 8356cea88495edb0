"""Quest: pages by an upper bound of the attention logit inside them."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import is_a
from ..budget import Tokens, tokens_from_int
from ..choices import PageGroup
from ._base import Selection, group_field, pages_field


@attrs.frozen(kw_only=True)
class Quest(Selection):
    """Page selection of Quest (mit-han-lab/Quest), on admitted tokens as in WG-KV.

    A page's score is the sum over channels of max(q * min, q * max) with the page's smallest and
    largest key: no q.k inside exceeds it. `budget` counts tokens per KV head including the window,
    so `ceil((budget - window) / page_size)` pages are read besides it; the trailing page is always
    one of them (`last=1`). `group="each"` is the original's choice per query head. Behind an
    admission a page's tokens lie far apart, which loosens its bound: smaller pages
    (`attach(..., page_size=4)`) then choose better.

    Example:
        `CachePipeline(selection=Quest(budget=1024))`
    """

    budget: Tokens = attrs.field(
        converter=tokens_from_int,
        validator=is_a(Tokens, "Tokens(n) or an int", lambda value: "budget=1024"),
    )
    first: int = pages_field(0)
    last: int = pages_field(1)
    group: PageGroup = group_field()

    @property
    def fused(self) -> str:  # type: ignore[override]
        return "quest_select"

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        low = keys.masked_fill(~valid[..., None], float("inf")).amin(1)
        high = keys.masked_fill(~valid[..., None], float("-inf")).amax(1)
        return torch.cat([low, high], -1)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        low, high = summary[:, :, None].float().chunk(2, -1)
        q = query[:, :, :, None].float()
        return torch.maximum(q * low, q * high).sum(-1)
