"""Hybrid sparse attention: Quest's bound on the channels where a query is large."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor

from .._fields import is_a, positive
from .._names import named
from ..budget import Tokens
from ..choices import PageGroup
from ._base import Selection, first_field, group_field, last_field
from .quest import quest_tokens


@named
@attrs.frozen(kw_only=True)
class TopChannels(Selection):
    """Page selection of RocketKV's second stage (Behnam et al., 2025; NVlabs/RocketKV).

    A KV head looks at the `channels` channels whose `|q|` is largest, a mean over its group. There
    a page counts by its largest key where the sum of the group's queries is positive, by its
    smallest elsewhere; a query head's score is the sum of q times that. RocketKV takes the mean
    over the group of softmaxes over all tokens; here a page's score depends on itself only, and
    `group` combines scores. It reads `channels` of D numbers where Quest reads 2 D, and RocketKV's
    pages are small: `attach(..., page_size=4)`. `budget`, `first` and `last` are as in `Quest`.

    Example:
        `CachePipeline(selection=TopChannels(budget=1024, channels=32))`
    """

    budget: Tokens = attrs.field(
        converter=quest_tokens,
        validator=is_a(Tokens, "Tokens(n) or an int", lambda value: "budget=1024"),
    )
    channels: int = attrs.field(default=32, validator=positive)
    first: int = first_field()
    last: int | Literal["partial"] = last_field(1)
    group: PageGroup = group_field("mean")

    @property
    def extends_minmax(self) -> bool:
        return True

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        if self.channels > head_dim:
            raise ValueError(f"channels: wanted at most {head_dim} of a key, got {self.channels}")

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        low = keys.masked_fill(~valid[..., None], float("inf")).amin(1)
        high = keys.masked_fill(~valid[..., None], float("-inf")).amax(1)
        return torch.cat([low, high], -1)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        q = query.to(torch.promote_types(query.dtype, torch.float32))
        # Head by head: how a sum over a group is rounded depends on where it lies.
        heads = q.unbind(2)
        size, total = sum(x.abs() for x in heads), sum(heads)
        assert isinstance(size, Tensor) and isinstance(total, Tensor)
        best = size.topk(self.channels, dim=-1).indices  # [B, Hkv, r]
        low, high = summary.chunk(2, -1)
        edge = torch.where(total[:, :, None] > 0, high.to(q), low.to(q))  # [B, Hkv, M, D]
        pages = edge.gather(-1, best[:, :, None].expand(-1, -1, edge.shape[2], -1))
        q = q.gather(-1, best[:, :, None].expand(-1, -1, q.shape[2], -1))
        pages = pages.masked_fill(counts[..., None] == 0, 0)
        return (q[:, :, :, None] * pages[:, :, None]).sum(-1)
