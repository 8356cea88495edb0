"""KeyDiff: keep the keys that are unlike the others."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class KeyDiff(Eviction):
    """Scores tokens by `-cos(k, a)`, a being the mean of `k / |k|` over all keys of the head.

    Park et al., 2025 (NVIDIA/kvpress, keydiff_press.py). Keys in the window count in the mean. The
    paper drops block by block while it reads: prompts in chunks, `end_prompt` after each.

    Example:
        `CachePipeline(eviction=KeyDiff(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()

    @property
    def prefers_window(self) -> int:
        return 1

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        total = _with_window(ops.key_directions(stored.pages, stored.heads), stored.view())
        mean = F.normalize(total, dim=-1).to(wide(stored.pages.k))
        return -ops.key_dots(stored.pages, stored.heads, mean, unit=True)

    def score(self, view: EvictionView) -> Tensor:
        total = _with_window(_directions(view.keys, view.valid), view)
        keys = view.keys.to(wide(view.keys))
        return -F.cosine_similarity(keys, total.to(keys.dtype)[:, :, None], dim=-1)


def _with_window(total: Tensor, view: EvictionView) -> Tensor:
    return total + _directions(view.recent_keys, view.recent_valid[:, None])


def _directions(keys: Tensor, valid: Tensor) -> Tensor:
    """The sum `[B, Hkv, D]` of k / |k| over the valid ones.

    In float64, so that how far a view is padded decides nothing.
    """
    units = F.normalize(keys.to(wide(keys)), dim=-1).masked_fill(~valid[..., None], 0)
    return units.sum(2, dtype=torch.float64)
