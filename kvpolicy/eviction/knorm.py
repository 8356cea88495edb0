"""Knorm: keep the keys of small norm."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class Knorm(Eviction):
    """Scores tokens by `-|k|`, the norm of the key as it is stored.

    Devoto et al., 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression
    (NVIDIA/kvpress, knorm_press.py). The authors leave the first two layers as they are:
    `per_layer(Knorm(budget=n), {range(2): KeepAll()})`.

    Example:
        `CachePipeline(eviction=Knorm(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()

    @property
    def prefers_window(self) -> int:
        return 1

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        return -ops.key_norms(stored.pages, stored.heads)

    def score(self, view: EvictionView) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(view.keys, dim=-1, dtype=wide(view.keys))
        return -norms
