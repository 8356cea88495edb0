"""What an eviction asks for besides stored tokens, made at random, and what a model would tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..eviction import Eviction, EvictionView, QueryStats
from ..pipeline import CachePipeline
from ..rope import Rope
from ..spec import CacheSpec
from ..store import CacheState

OF_MODEL = ("output_weight", "sinks")  # in a view and the same for all sequences


def random_rope(head_dim: int) -> Rope | None:
    """Frequencies as of most models; None for heads that have no pairs of channels."""
    pairs = head_dim // 2
    return Rope(frequencies=tuple(100.0 ** -(f / pairs) for f in range(pairs))) if pairs else None


def random_weight(
    heads: int, value_dim: int, hidden: int, layer: int, seed: int, dtype: torch.dtype
) -> Tensor:
    """An output projection `[heads, value_dim, hidden]`."""
    rng = torch.Generator().manual_seed(seed * 1000 + layer + 17)
    return torch.randn(heads, value_dim, hidden, generator=rng).to(dtype)


def asked(
    policy: Eviction, view: EvictionView, query_heads: int, hidden: int, seed: int
) -> EvictionView:
    """The view with what `policy` asks for."""
    rng = torch.Generator().manual_seed(seed * 1000 + view.layer + 5)
    batch, dim, dtype = len(view.lengths), view.keys.shape[3], view.keys.dtype
    at = view.lengths[:, None] - policy.hidden + torch.arange(policy.hidden)
    if policy.query_stats:
        wide = torch.promote_types(dtype, torch.float32)
        queries = torch.randn(batch, query_heads, 2 * dim, dim, generator=rng).to(wide)
        mean = queries.mean(2)
        away = queries - mean[:, :, None]
        covariance = away.mT @ away / queries.shape[2]
        tokens = (view.lengths - policy.query_skip).clamp(min=0)
        view = view._replace(query_stats=QueryStats(tokens, mean, covariance))
    if policy.hidden:
        states = torch.randn(batch, policy.hidden, hidden, generator=rng).to(dtype)
        states = states.masked_fill((at < 0)[..., None], 0)
        view = view._replace(hidden=states, hidden_valid=at >= 0)
    if policy.output_weight:
        sizes = query_heads, view.values.shape[3], hidden
        weight = random_weight(*sizes, view.layer, seed, dtype)
        view = view._replace(output_weight=weight)
    return view._replace(rope=random_rope(dim)) if policy.rope else view


def everything(
    policy: Eviction, view: EvictionView, query_heads: int, hidden: int, seed: int
) -> EvictionView:
    """The view with what `policy` asks for and with all that it does not ask for."""
    asks_for_all: Any = SimpleNamespace(
        query_stats=not policy.query_stats, query_skip=0, hidden=0 if policy.hidden else 5,
        output_weight=not policy.output_weight, rope=not policy.rope,
    )  # fmt: skip
    view = asked(asks_for_all, view, query_heads, hidden, seed + 1)
    rng = torch.Generator().manual_seed(seed)
    if view.queries is None:
        shape = len(view.lengths), query_heads, 5, view.keys.shape[3]
        at = view.lengths[:, None] - 5 + torch.arange(5)
        queries = torch.randn(shape, generator=rng).to(view.keys.dtype)
        view = view._replace(queries=queries, query_valid=at >= 0)
    if view.numbers is None:
        near = view.recent_keys[..., 0]
        numbers, recent = (torch.rand(x.shape, generator=rng) for x in (view.valid, near))
        view = view._replace(numbers=numbers, recent_numbers=recent)
    return view


def poisoned_asked(view: EvictionView, garbage: float) -> EvictionView:
    """Garbage where what was asked for is not valid."""
    hide = ~view.recent_valid[:, None, :, None]
    view = view._replace(recent_values=view.recent_values.masked_fill(hide, garbage))
    if view.hidden is None or view.hidden_valid is None:
        return view
    hidden = view.hidden.masked_fill(~view.hidden_valid[..., None], garbage)
    return view._replace(hidden=hidden)


def one_row_asked(view: EvictionView, row: int) -> EvictionView:
    """Statistics of one sequence alone, all else as it is."""
    if view._query_stats is None:
        return view
    return view._replace(query_stats=QueryStats(*(x[row : row + 1] for x in view.query_stats)))


def one_head_asked(view: EvictionView, head: int) -> EvictionView:
    """What was asked for of one KV head and its query heads alone, all else as it is."""
    heads = len(view.heads)
    parts: dict[str, Any] = {
        "heads": view.heads[head : head + 1],
        "recent_values": view.recent_values[:, head : head + 1],
    }
    if view._output_weight is not None:
        parts["output_weight"] = view.output_weight.chunk(heads)[head]
    if view._query_stats is not None:
        tokens, mean, covariance = view.query_stats
        stats = QueryStats(tokens, mean.chunk(heads, 1)[head], covariance.chunk(heads, 1)[head])
        parts["query_stats"] = stats
    return view._replace(**parts)


def tell_random(
    pipeline: CachePipeline, state: CacheState, spec: CacheSpec, hidden: int, seed: int
) -> None:
    """Tells a cache what its evictions ask of a model."""
    for layer in state.managed:
        sizes = layer.sizes
        if layer.eviction.output_weight:
            size = sizes.heads, sizes.value_dim, hidden
            weight = random_weight(*size, layer.index, seed, spec.dtype)
            pipeline.tell(state, layer.index, output_weight=weight)
        if layer.eviction.rope:
            pipeline.tell(state, layer.index, rope=random_rope(sizes.head_dim))
