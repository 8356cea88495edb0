"""What a model would bring and tell for evictions that ask, made of the tokens themselves."""

from __future__ import annotations

import torch

from kvpolicy import QueryStats, Rope


def before(query):
    """Queries before RoPE, some function of those after it."""
    return query.flip(-1)


def rope(spec, layer):
    """Frequencies for all pairs of channels that a head has."""
    pairs = spec.at(layer).head_dim // 2
    return Rope(frequencies=tuple(20.0 ** (-f / pairs) for f in range(pairs)))


def weight(spec, layer):
    """The output projection `[Hq, Dv, 6]` of the heads on this rank, multiples of 1/8."""
    sizes = spec.at(layer)
    group = sizes.heads // sizes.kv_heads
    rng = torch.Generator().manual_seed(layer)
    every = spec.model_kv_heads * group, sizes.value_dim, 6
    whole = torch.randint(-8, 8, every, generator=rng) / 8
    first = spec.head_offset * group
    return whole[first : first + sizes.heads].to(spec.dtype)


def tell(pipeline, state):
    """Tells all layers."""
    spec = state.spec
    for layer in range(spec.layers):
        made = weight(spec, layer).to(spec.device_of(layer))
        pipeline.tell(state, layer, rope=rope(spec, layer), output_weight=made)


def asked(oracle):
    """The same for the view of one sequence's layer, from the tokens that an oracle holds."""
    spec, layer, n = oracle.spec, oracle.layer, oracle.n
    skip = oracle.eviction.query_skip
    q = before(oracle.q[:, skip:n]).double()
    count = max(n - skip, 0)
    mean = q.mean(1) if count else q.new_zeros(q.shape[0], q.shape[2])
    away = q - mean[:, None]
    covariance = away.mT @ away / max(count, 1)
    stats = QueryStats(torch.tensor([count]), mean[None], covariance[None])
    return {
        "query_stats": stats,
        "rope": rope(spec, layer),
        "output_weight": weight(spec, layer),
        "layers": spec.layers,
        "group": oracle.group,
    }
