"""StreamingLLM: the first tokens and the most recent ones."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import not_negative
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ._base import Eviction, when_field
from ._view import EvictionView


@named
@attrs.frozen(kw_only=True)
class StreamingLLM(Eviction):
    """Keeps the first `sinks` tokens of a sequence and the most recent of the others.

    Xiao et al., 2023 (mit-han-lab/streaming-llm, streaming_llm/kv_cache.py: `start_size`,
    `recent_size`); NVIDIA/kvpress, streaming_llm_press.py, has the same set. A budget of n tokens
    leaves `sinks` and the last n - `sinks`, also where `when="decode"` goes on while tokens are
    generated. Keys keep their true positions. The prompt is dense; as an admission,
    `LocalAttention` holds the same set and never writes the rest.

    Example:
        `CachePipeline(eviction=StreamingLLM(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    sinks: int = attrs.field(default=4, validator=not_negative)
    when: When = when_field("decode")

    @property
    def prefers_window(self) -> int:
        return 1

    def score(self, view: EvictionView) -> Tensor:
        age = (view.positions - view.lengths[:, None, None]).float()  # exact below 2^24 tokens
        return torch.where(view.positions < self.sinks, 1.0, age)
