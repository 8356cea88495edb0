"""What an eviction sees of one layer, and the scores that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

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

Places = dict[tuple[int, torch.device], Tensor]  # 0, 1, ... by how many and where


def score(
    state: CacheState, layer: LayerStore, most: int, places: Places | None = None
) -> tuple[Tensor, Tensor]:
    """Scores `[B, Hkv, N]` of a layer's global tokens by its eviction, and which slots hold one.

    `most` is the largest number of global tokens of a head; `places` as in `held`.
    """
    policy = layer.eviction
    check_told(layer)
    table, valid = held(layer, most, places)
    stored = StoredTokens(
        layer.pool.pages, layer.heads._replace(table=table), layer.ring, layer.queries,
        state.on(layer).lengths, layer.window, layer.sizes.scale, layer.sizes.softcap, layer.sinks,
        partial(view, state, layer, most),
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


def held(layer: LayerStore, most: int, places: Places | None = None) -> tuple[Tensor, Tensor]:
    """The table's columns in use and `valid` `[B, Hkv, N]`, the longest head having `most`.

    Numbers of tokens, which are alike in many layers, are made once in `places`.
    """
    size = layer.pool.page_size
    used = pages_of(most, size)
    places, alike = {} if places is None else places, (used * size, layer.device)
    if alike not in places:
        places[alike] = torch.arange(used * size, device=layer.device)
    return layer.table[:, :, :used], places[alike] < layer.counts[..., None]


def view(state: CacheState, layer: LayerStore, most: int) -> EvictionView:
    """What an eviction sees of one layer, whose longest head holds `most` tokens."""
    table, valid = held(layer, most)
    lengths = state.on(layer).lengths
    recent_keys, at = last(layer.ring.k, lengths, layer.window)
    queries = query_valid = None
    if layer.queries is not None and layer.eviction.queries:
        queries, query_at = last(layer.queries, lengths, layer.eviction.queries)
        query_valid = query_at >= 0

    hidden = hidden_at = stats = None
    if layer.query_ring is not None:
        stats = partial(moments.query_stats, state, layer)
    if layer.hidden is not None:
        hidden, hidden_at = last(layer.hidden, lengths, layer.eviction.hidden)
        hidden = hidden[:, 0].masked_fill((hidden_at < 0)[..., None], 0)

    def recent_values() -> Tensor:
        found, _ = last(layer.ring.v, lengths, layer.window)
        return found.masked_fill((at < 0)[:, None, :, None], 0)

    @cache
    def content() -> tuple[Tensor, Tensor]:
        k, v, _ = state.ops.read_pages(layer.pool.pages, table)
        hide = ~valid[..., None]
        return k.flatten(2, 3).masked_fill_(hide, 0), v.flatten(2, 3).masked_fill_(hide, 0)

    @cache
    def meta() -> Tensor:
        return state.ops.read_meta(layer.pool.pages, table).flatten(2).masked_fill_(~valid, 0)

    @cache
    def numbers() -> tuple[Tensor, Tensor]:
        found, width = seen(state, layer), valid.shape[2]
        stored = F.pad(found.stored, (0, max(width - found.stored.shape[2], 0)))[..., :width]
        near = last(found.recent[..., None], lengths, layer.window)[0][..., 0]
        return stored.masked_fill(~valid, 0), near.masked_fill((at < 0)[:, None], 0)

    asks = layer.numbers is not None
    return EvictionView(
        layer=layer.index,
        keys=lambda: content()[0],
        values=lambda: content()[1],
        positions=lambda: meta() & POSITION_MASK,
        valid=valid,
        marked=lambda: (meta() >> POSITION_BITS) & 1 > 0,
        recent_keys=recent_keys.masked_fill((at < 0)[:, None, :, None], 0),
        recent_valid=at >= 0,
        lengths=lengths,
        scale=layer.sizes.scale,
        queries=queries,
        query_valid=query_valid,
        softcap=layer.sizes.softcap,
        sinks=layer.sinks,
        numbers=(lambda: numbers()[0]) if asks else None,
        recent_numbers=(lambda: numbers()[1]) if asks else None,
        recent_values=recent_values,
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
    )
