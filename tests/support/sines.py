"""Queries, keys and values made of sines, so that recorded cases are a few numbers."""

from __future__ import annotations

import torch

from kvpolicy import CachePipeline, CacheSpec, Rope

T, HEADS, KV_HEADS, DIM = 48, 4, 2, 8


def waves(phase, heads):
    """`[heads, T, DIM]` in float64."""
    h, t, d = (torch.arange(n, dtype=torch.float64) for n in (heads, T, DIM))
    h, t, d = h[:, None, None], t[None, :, None], d[None, None]
    return 2 * torch.sin(phase + 1.7 * h + 0.9 * t * (d + 1) + 0.31 * t * t)


QUERY, VALUE = waves(0.3, HEADS), waves(2.3, KV_HEADS)
LENGTHS = 1 + 0.3 * torch.sin(torch.arange(T, dtype=torch.float64) * 1.3)
KEY = waves(1.1, KV_HEADS) * LENGTHS[:, None]
# Of a model: `QUERY` stands for queries before RoPE as well.
WEIGHT = waves(0.9, HEADS)[:, :DIM] + waves(1.9, HEADS)[:, 5 : 5 + DIM]
ROPE = Rope(frequencies=(1.0, 0.3, 0.1, 0.03))


def kept(eviction, *, prompt=T, cuts=1, interval=1, window=None, rope=ROPE, **parts):
    """Positions that each KV head holds of the first `prompt` tokens, the others decoded."""
    pipeline = CachePipeline(eviction=eviction, backend="reference", window=window, **parts)
    state = pipeline.init(
        CacheSpec(
            layers=1, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, page_size=4,
            dtype=torch.float64, interval=interval,
        )
    )  # fmt: skip
    pipeline.tell(state, 0, rope=rope, output_weight=WEIGHT)
    for part in torch.arange(prompt).chunk(cuts):
        pipeline.begin(state, [len(part)], "prompt")
        pipeline.attend(
            state, 0, QUERY[:, part], KEY[:, part], VALUE[:, part], query_pre=QUERY[:, part]
        )
        pipeline.commit(state)
    pipeline.end_prompt(state)
    for at in range(prompt, T):
        pipeline.begin(state, [1], "decode")
        one = (x[None, :, at : at + 1] for x in (QUERY, KEY, VALUE))
        pipeline.attend(state, 0, *one, query_pre=QUERY[None, :, at : at + 1])
        pipeline.commit(state)
    return [state.kept(0, 0, head).tolist() for head in range(KV_HEADS)]
