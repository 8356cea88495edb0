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
from ._attention import used_slots
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens

_FIXED = 1 << 40  # sums of cosines are taken in units of this part: integers add in any order


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
        return self._scores(stored.view(), ops)

    def score(self, view: EvictionView) -> Tensor:
        return self._scores(view, None)

    def _scores(self, view: EvictionView, ops: Ops | None) -> Tensor:
        """Sequence by sequence, as long as each is; without `ops` cosines are formed at once."""
        found = torch.zeros(view.valid.shape, dtype=wide(view.keys), device=view.keys.device)
        for row, used in enumerate(used_slots(view)):
            if used:
                seen = self._importance(view, row, used) * self.mix
                found[row, :, :used] = seen - self._redundancy(view, row, used, ops) * (
                    1 - self.mix
                )
        return found

    def _importance(self, view: EvictionView, row: int, used: int) -> Tensor:
        """`[Hkv, used]`."""
        assert view.queries is not None and view.query_valid is not None
        kv_heads = view.keys.shape[1]
        q = view.queries[row].unflatten(0, (kv_heads, -1)).to(wide(view.keys))
        keys, valid = view.keys[row, :, None, :used].to(q), view.valid[row, :, :used]
        logits = q @ keys.mT * view.scale  # [Hkv, G, w, used]
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        logits = logits.amax(1) if self.group == "max" else logits.mean(1)
        weights = logits.masked_fill(~valid[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        count = view.query_valid[row].sum().clamp(min=1)
        mass = (weights * view.query_valid[row, :, None]).sum(1) / count
        return F.max_pool1d(mass, self.kernel, 1, self.kernel // 2)

    def _redundancy(self, view: EvictionView, row: int, used: int, ops: Ops | None) -> Tensor:
        """`[Hkv, used]`: stored keys and then the window's, without gaps between them."""
        valid, near = view.valid[row, :, :used], view.recent_valid[row]
        keys = torch.cat([view.keys[row, :, :used], view.recent_keys[row]], 1)
        there = torch.cat([valid, near.expand(len(valid), -1)], 1)  # [Hkv, n]
        order = (~there).int().sort(dim=1, stable=True).indices
        counts = there.sum(1)
        keys = keys.gather(1, order[..., None].expand(-1, -1, keys.shape[2]))
        units = keys.to(wide(keys))
        norms = torch.linalg.vector_norm(units, dim=-1, keepdim=True)
        units = (units / (norms + 1e-8)).to(keys.dtype)
        last = (
            _last(units, counts, self.threshold)
            if ops is None
            else ops.last_similar(units, counts, self.threshold)
        )
        units, place = units.to(wide(keys)), torch.arange(keys.shape[1], device=keys.device)
        held = place < counts[:, None]
        units = units.masked_fill(~held[..., None], 0)
        retained = last.long().clamp(min=0)  # the original's: 0 where none resembles
        cosine = (units * units.gather(1, retained[..., None].expand_as(units))).sum(-1)
        cosine = cosine.masked_fill((retained == place) | ~held, 0)
        fixed = (cosine.double() * _FIXED).round().long()
        left = torch.zeros_like(fixed).scatter_add_(1, retained, fixed).double() / _FIXED
        every = (units * units.sum(1, keepdim=True)).sum(-1) - (units * units).sum(-1)
        mean = (every - left.to(every)) / counts[:, None].clamp(min=1)
        found = mean.masked_fill(~held, float("-inf")).softmax(-1).nan_to_num(0.0)
        back = torch.zeros_like(found).scatter_(1, order, found)
        return back[:, :used]


def _last(units: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """What `Ops.last_similar` says, from all cosines at once."""
    place = torch.arange(units.shape[1], device=units.device)
    wider = units.to(wide(units))
    alike = (wider @ wider.mT > threshold) & (place < counts[:, None, None])
    alike &= place[:, None] != place
    found: Tensor = torch.where(alike, place, -1).amax(-1)
    return found
