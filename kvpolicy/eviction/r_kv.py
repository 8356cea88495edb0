"""R-KV: keep what the last queries look at and no other key repeats."""

from __future__ import annotations

from typing import get_args

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import number, odd, one_of, positive
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import HeadGroup, When
from ..ops import Ops
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens


@named
@attrs.frozen(kw_only=True)
class RKV(Eviction):
    """Scores tokens by `mix` x importance - (1 - `mix`) x redundancy.

    Importance: the logits of the last `observation` queries, over a group's query heads by `group`
    before their softmax over the stored tokens, the mean over queries, the largest of `kernel`
    neighbours. Redundancy: the softmax over a head's keys, the window's included, of their mean
    cosine with all of these; of the keys that resemble one (cosine > `threshold`) it does not count
    to the last one's mean, nor to its own.

    Cai et al., 2025, R-KV (Zefan-Cai/R-KV, rkv/compression/r1_kv.py and rkv/utils.py with
    `retain_direction="last"`). No product of all keys with all others is held. The authors compress
    every 128 generated tokens: `attach(..., interval=128)`.

    Example:
        `CachePipeline(eviction=RKV(budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field("decode")
    observation: int = attrs.field(default=8, validator=positive)
    kernel: int = attrs.field(default=7, validator=odd)
    mix: float = attrs.field(default=0.07, validator=number("from 0 to 1", lambda x: 0 <= x <= 1))
    threshold: float = attrs.field(
        default=0.5, validator=number("from 0 to 1", lambda x: 0 <= x <= 1)
    )
    group: HeadGroup = attrs.field(default="max", validator=one_of(*get_args(HeadGroup)))

    @property
    def queries(self) -> int:
        return self.observation

    @property
    def prefers_window(self) -> int:
        return self.observation

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        assert stored.queries is not None
        return ops.redundancy_scores(
            stored.pages, stored.heads, stored.ring, stored.queries, stored.lengths, stored.window,
            stored.scale, observation=self.observation, kernel=self.kernel, mix=self.mix,
            threshold=self.threshold, group=self.group, softcap=stored.softcap,
        )  # fmt: skip

    def score(self, view: EvictionView) -> Tensor:
        assert view.queries is not None
        found = torch.zeros(view.valid.shape, dtype=wide(view.keys), device=view.keys.device)
        for row, used in enumerate(view.used):
            if used:
                keys, valid = view.keys[row, :, :used], view.valid[row, :, :used]
                q = view.queries[row].unflatten(0, (len(keys), -1)).to(found)
                seen = self._importance(view, row, q @ keys[:, None].to(q).mT, valid)
                alike = _shared(self._means(view, row, keys), view, row, valid)
                found[row, :, :used] = seen * self.mix - alike * (1 - self.mix)
        return found

    def _importance(self, view: EvictionView, row: int, dots: Tensor, valid: Tensor) -> Tensor:
        """`[H, n]`, from the queries' products `[H, G, w, n]` with the first n slots."""
        assert view.query_valid is not None
        logits = dots * view.scale
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        logits = logits.amax(1) if self.group == "max" else logits.mean(1)
        weights = logits.masked_fill(~valid[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        count = view.query_valid[row].sum().clamp(min=1)
        mass = (weights * view.query_valid[row, :, None]).sum(1) / count
        return F.max_pool1d(mass, self.kernel, 1, self.kernel // 2)

    def _means(self, view: EvictionView, row: int, keys: Tensor) -> Tensor:
        """Means of cosines `[H, n + W]`, from all of them at once."""
        near = view.recent_valid[row]
        units = torch.cat([keys, view.recent_keys[row]], 1)
        there = torch.cat([view.valid[row, :, : keys.shape[1]], near.expand(len(keys), -1)], 1)
        order = (~there).int().sort(dim=1, stable=True).indices  # no gaps
        units = units.gather(1, order[..., None].expand_as(units)).to(wide(keys))
        norms = torch.linalg.vector_norm(units, dim=-1, keepdim=True)
        units = (units / (norms + 1e-8)).to(keys).to(units)
        place, counts = torch.arange(units.shape[1], device=keys.device), there.sum(1)
        held = place < counts[:, None]
        cosines = (units @ units.mT) * (held[:, None] & held[..., None])
        cosines = cosines * (place[:, None] != place)
        last = torch.where(cosines > self.threshold, place, -1).amax(-1)
        last = last.clamp(min=0)  # the original's: 0 where none resembles
        counted = last[..., None] != place  # not to the mean of the last one
        means: Tensor = (cosines * counted).sum(1) / counts[:, None].clamp(min=1)
        return means


def _shared(means: Tensor, view: EvictionView, row: int, valid: Tensor) -> Tensor:
    """Redundancies `[H, n]` of the stored tokens: the softmax of means `[H, n + W]`."""
    counts = valid.sum(1) + view.recent_valid[row].sum()
    held = torch.arange(means.shape[1], device=means.device) < counts[:, None]
    found = means.masked_fill(~held, float("-inf")).softmax(-1)[:, : valid.shape[1]]
    return found.masked_fill(~valid, 0)
