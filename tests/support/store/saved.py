"""A cache with tokens in rings and pages, and calls to go on with it."""

from __future__ import annotations

import torch

from kvpolicy import CachePipeline, CacheSpec, Quest, RandomGate, SnapKV

SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, rollback=3)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.3),
    selection=Quest(budget=9),
    eviction=SnapKV(budget=30, observation=3, when="decode"),
    window=5,
)


def call(pipeline, state, phase, counts, seed=0):
    rng = torch.Generator().manual_seed(seed)
    spec = state.spec
    lead = () if phase == "prompt" else (state.batch,)
    tokens = sum(counts) if phase == "prompt" else 1
    pipeline.begin(state, counts, phase)
    outs = []
    for layer in range(spec.layers):
        q = torch.randn(*lead, spec.heads, tokens, spec.head_dim, generator=rng).to(spec.dtype)
        k, v = (
            torch.randn(*lead, spec.kv_heads, tokens, spec.head_dim, generator=rng).to(spec.dtype)
            for _ in range(2)
        )
        outs.append(pipeline.attend(state, layer, q, k, v, key_pre=k))
    pipeline.commit(state)
    return torch.stack(outs)


def filled(pipeline=PIPELINE, spec=SPEC, counts=(50, 23)):
    state = pipeline.init(spec, len(counts))
    call(pipeline, state, "prompt", counts)
    pipeline.end_prompt(state)
    call(pipeline, state, "decode", [1] * len(counts), seed=1)
    return state
