"""What an eviction sees of one layer, and the scores that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eviction import EvictionView, StoredTokens
from ..exchange import ALONE, Exchange
from ..ops import POSITION_BITS, POSITION_MASK, pages_of
from ..store import moments
from ..store.layer import LayerStore
from ..store.ring import last
from ..store.state import CacheState
from ._checks import check_told
from .settle import seen

Shared = dict[Any, Any]  # what is made once for all layers of a round


def score(
    state: CacheState, layer: LayerStore, most: int, shared: Shared | None = None
) -> tuple[Tensor, Tensor]:
    """Scores `[B, Hkv, N]` of a layer's global tokens by its eviction, and which slots hold one.

    `most` is the largest number of global tokens of a head; what layers have in common is made once
    in `shared`.
    """
    shared = {} if shared is None else shared
    policy = layer.eviction
    check_told(layer)
    table, valid = held(layer, most, shared)
    stored = StoredTokens(
        layer.pool.pages, layer.heads._replace(table=table), layer.ring, layer.queries,
        state.on(layer).lengths, layer.window, layer.sizes.scale, layer.sizes.softcap, layer.sinks,
        partial(view, state, layer, most, shared),
    )  # fmt: skip
    scores = policy.scores(state.ops, stored)
    wanted = f"{type(policy).__name__}.score: wanted floats {list(valid.shape)} without NaN"
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{wanted}, got {got}")
    if scores.shape != valid.shape:
        raise ValueError(f"{wanted}, got {list(scores.shape)}")
    return scores, valid


def longest(layers: Sequence[LayerStore], exchange: Exchange = ALONE) -> list[int]:
    """Most global tokens of a head in each layer, on any rank; waits for the device once."""
    return largest([x.counts for x in layers], exchange)


def largest(counts: Sequence[Tensor], exchange: Exchange) -> list[int]:
    """The largest of each tensor, on any rank; waits for the device once."""
    if not counts:
        return []
    alike = all(x.shape == counts[0].shape and x.device == counts[0].device for x in counts)
    if alike:
        largest = torch.stack([*counts]).flatten(1).amax(1)
    else:
        largest = torch.stack([x.amax().to(counts[0].device) for x in counts])
    most: list[int] = largest.tolist()
    return [max(told) for told in zip(*exchange.numbers(most), strict=True)]


def held(layer: LayerStore, most: int, shared: Shared) -> tuple[Tensor, Tensor]:
    """The table's columns in use and `valid` `[B, Hkv, N]`, the longest head having `most`."""
    size = layer.pool.page_size
    used = pages_of(most, size)
    key = "tokens", used * size, layer.device
    if key not in shared:
        shared[key] = torch.arange(used * size, device=layer.device)
    return layer.table[:, :, :used], shared[key] < layer.counts[..., None]


def view(
    state: CacheState, layer: LayerStore, most: int, shared: Shared | None = None
) -> EvictionView:
    """What an eviction sees of one layer, whose longest head holds `most` tokens."""
    shared = {} if shared is None else shared
    table, valid = held(layer, most, shared)
    lengths = state.on(layer).lengths

    def newest(ring: Tensor) -> Tensor:
        """What a ring holds of the window, zeros before the first token."""
        found, at = last(ring, lengths, layer.window, shared)
        key = "before", layer.window, layer.device
        if key not in shared:
            shared[key] = (at < 0)[:, None, :, None]
        return found.masked_fill(shared[key], 0)

    def valid_of(count: int) -> Tensor:
        return torch.arange(-count, 0, device=layer.device) + lengths[:, None] >= 0

    def observed() -> Tensor:
        assert layer.queries is not None
        return last(layer.queries, lengths, layer.eviction.queries, shared)[0]

    observes = layer.queries is not None and layer.eviction.queries > 0

    hidden = hidden_at = stats = None
    if layer.query_ring is not None:
        stats = partial(moments.query_stats, state, layer, shared)
    if layer.hidden is not None:
        hidden, hidden_at = last(layer.hidden, lengths, layer.eviction.hidden, shared)
        hidden = hidden[:, 0].masked_fill((hidden_at < 0)[..., None], 0)

    @cache
    def content() -> tuple[Tensor, Tensor]:
        k, v, _ = state.ops.read_pages(layer.pool.pages, table)
        hide = ~valid[..., None]
        return k.flatten(2, 3).masked_fill_(hide, 0), v.flatten(2, 3).masked_fill_(hide, 0)

    @cache
    def meta() -> Tensor:
        return state.ops.read_meta(layer.pool.pages, table).flatten(2).mul_(valid)

    @cache
    def numbers() -> tuple[Tensor, Tensor]:
        found, width = seen(state, layer), valid.shape[2]
        stored = F.pad(found.stored, (0, max(width - found.stored.shape[2], 0)))[..., :width]
        return stored.masked_fill(~valid, 0), newest(found.recent[..., None])[..., 0]

    asks = layer.numbers is not None
    return EvictionView(
        layer=layer.index,
        keys=lambda: content()[0],
        values=lambda: content()[1],
        positions=lambda: meta() & POSITION_MASK,
        valid=valid,
        marked=lambda: (meta() >> POSITION_BITS) & 1 > 0,
        recent_keys=lambda: newest(layer.ring.k),
        recent_valid=lambda: valid_of(layer.window),
        lengths=lengths,
        scale=layer.sizes.scale,
        queries=observed if observes else None,
        query_valid=(lambda: valid_of(layer.eviction.queries)) if observes else None,
        softcap=layer.sizes.softcap,
        sinks=layer.sinks,
        numbers=(lambda: numbers()[0]) if asks else None,
        recent_numbers=(lambda: numbers()[1]) if asks else None,
        recent_values=lambda: newest(layer.ring.v),
        heads=state.spec.head_ids,
        query_stats=stats,
        hidden=hidden,
        hidden_valid=None if hidden_at is None else hidden_at >= 0,
        output_weight=layer.output_weight,
        rope=layer.rope,
        layers=state.spec.layers,
        group=layer.sizes.heads // layer.sizes.kv_heads,
        across=state.exchange.heads if state.exchange.parts > 1 else None,
        used=[most] if state.batch == 1 else None,
        shared=shared.setdefault("policies", {}),
    )
