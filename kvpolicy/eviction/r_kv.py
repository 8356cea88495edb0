"""R-KV: keep what the last queries look at and no other key repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

Last = Callable[[Tensor, Tensor, float], Tensor]
_AT_ONCE = 1 << 17  # tokens of a few heads that are copied at once
_WIDE = 1 << 14  # of a head, in float32
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
        view = stored.view()
        found = torch.zeros(
            view.valid.shape, dtype=wide(view.recent_keys), device=view.valid.device
        )
        for row, used in enumerate(used_slots(view)):
            for heads in _parts(found.shape[1], used):
                keys, _ = stored.read(ops, row, heads, slice(0, used))
                found[row, heads, :used] = self._scores(view, row, heads, keys, ops.last_similar)
        return found

    def score(self, view: EvictionView) -> Tensor:
        found = torch.zeros(view.valid.shape, dtype=wide(view.keys), device=view.keys.device)
        for row, used in enumerate(used_slots(view)):
            if used:
                keys, heads = view.keys[row, :, :used], slice(0, found.shape[1])
                found[row, :, :used] = self._scores(view, row, heads, keys, _last)
        return found

    def _scores(
        self, view: EvictionView, row: int, heads: slice, keys: Tensor, last: Last
    ) -> Tensor:
        """Scores `[H, n]` of the first n slots of a sequence's `heads`, with their keys."""
        seen = self._importance(view, row, heads, keys) * self.mix
        return seen - self._redundancy(view, row, heads, keys, last) * (1 - self.mix)

    def _importance(self, view: EvictionView, row: int, heads: slice, keys: Tensor) -> Tensor:
        """`[H, n]`."""
        assert view.queries is not None and view.query_valid is not None
        q = view.queries[row].unflatten(0, (view.valid.shape[1], -1))[heads].to(wide(keys))
        valid = view.valid[row, heads, : keys.shape[1]]
        logits = q @ keys[:, None].to(q).mT * view.scale  # [H, G, w, n]
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        logits = logits.amax(1) if self.group == "max" else logits.mean(1)
        weights = logits.masked_fill(~valid[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        count = view.query_valid[row].sum().clamp(min=1)
        mass = (weights * view.query_valid[row, :, None]).sum(1) / count
        return F.max_pool1d(mass, self.kernel, 1, self.kernel // 2)

    def _redundancy(
        self, view: EvictionView, row: int, heads: slice, keys: Tensor, last: Last
    ) -> Tensor:
        """`[H, n]`: stored keys and then the window's, without gaps between them."""
        used = keys.shape[1]
        valid, near = view.valid[row, heads, :used], view.recent_valid[row]
        units = torch.cat([keys, view.recent_keys[row, heads]], 1)
        there = torch.cat([valid, near.expand(len(valid), -1)], 1)
        order = (~there).int().sort(dim=1, stable=True).indices
        counts = there.sum(1)
        units = _units(units.gather(1, order[..., None].expand_as(units)))
        place = torch.arange(units.shape[1], device=keys.device)
        held = place < counts[:, None]
        units.masked_fill_(~held[..., None], 0)
        retained = last(units, counts, self.threshold).long()
        retained = retained.clamp_(min=0)  # the original's: 0 where none resembles
        total = _added(units)
        kept, every = total.new_empty(2, *held.shape)
        for part in _slices(units.shape[1]):
            own = units[:, part].to(kept)
            one = units.gather(1, retained[:, part, None].expand_as(own)).to(kept)
            kept[:, part] = (own * one).sum(-1)
            every[:, part] = (own * total[:, None]).sum(-1) - (own * own).sum(-1)
        kept = kept.masked_fill((retained == place) | ~held, 0)
        fixed = (kept.double() * _FIXED).round().long()
        left = torch.zeros_like(fixed).scatter_add_(1, retained, fixed).double() / _FIXED
        mean = (every - left.to(every)) / counts[:, None].clamp(min=1)
        found = mean.masked_fill(~held, float("-inf")).softmax(-1).nan_to_num(0.0)
        back = torch.zeros_like(found).scatter_(1, order, found)
        return back[:, :used]


def _parts(heads: int, tokens: int) -> Iterator[slice]:
    """As many heads at a time as may hold _AT_ONCE tokens together, one at least."""
    step = max(_AT_ONCE // max(tokens, 1), 1)
    for low in range(0, heads if tokens else 0, step):
        yield slice(low, min(low + step, heads))


def _slices(tokens: int) -> Iterator[slice]:
    """Tokens of which wide copies are made at a time."""
    for low in range(0, tokens, _WIDE):
        yield slice(low, min(low + _WIDE, tokens))


def _units(keys: Tensor) -> Tensor:
    """Keys `[H, n, D]` over their norms, in their dtype and in place."""
    for part in _slices(keys.shape[1]):
        own = keys[:, part].to(wide(keys))
        norms = torch.linalg.vector_norm(own, dim=-1, keepdim=True)
        keys[:, part] = (own / (norms + 1e-8)).to(keys)
    return keys


def _added(units: Tensor) -> Tensor:
    """Their sum `[H, D]`."""
    total = units.new_zeros(len(units), units.shape[2], dtype=wide(units))
    for part in _slices(units.shape[1]):
        total += units[:, part].to(total).sum(1)
    return total


def _last(units: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """What `Ops.last_similar` says, from all cosines at once."""
    place = torch.arange(units.shape[1], device=units.device)
    wider = units.to(wide(units))
    alike = (wider @ wider.mT > threshold) & (place < counts[:, None, None])
    alike &= place[:, None] != place
    found: Tensor = torch.where(alike, place, -1).amax(-1)
    return found
