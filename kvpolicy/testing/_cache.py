"""Running pipelines on random layers, so that properties of whole caches can be compared."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor

from ..pipeline import CachePipeline
from ..spec import CacheSpec
from ..store import CacheState
from ._asked import tell_random


@attrs.frozen(kw_only=True, eq=False)
class Data:
    """Random inputs of every layer, one `[H, N, D]` (or `[N, hidden]`) tensor a sequence."""

    spec: CacheSpec
    layers: list[list[dict[str, Tensor]]]  # [layer][sequence]
    lengths: list[int]  # prompt tokens; each sequence has `steps` more to decode
    steps: int

    def row(self, index: int) -> Data:
        """One sequence alone."""
        layers = [[layer[index]] for layer in self.layers]
        return attrs.evolve(self, layers=layers, lengths=[self.lengths[index]])


def random_data(spec: CacheSpec, lengths: list[int], steps: int, hidden: int, seed: int) -> Data:
    """Normal queries, keys, values, pre-RoPE keys and attention inputs."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(spec.dtype)

    def tokens(count: int) -> dict[str, Tensor]:
        kv = (spec.kv_heads, count, spec.head_dim)
        return {
            "query": draw(spec.heads, count, spec.head_dim),
            "key": draw(*kv),
            "value": draw(*kv),
            "key_pre": draw(*kv),
            "hidden": draw(count, hidden),
            "query_pre": draw(spec.heads, count, spec.head_dim),
        }

    layers = [[tokens(n + steps) for n in lengths] for _ in range(spec.layers)]
    return Data(spec=spec, layers=layers, lengths=lengths, steps=steps)


def prompt(
    pipeline: CachePipeline, data: Data, size: int, outs: list[list[Tensor]] | None = None
) -> CacheState:
    """A cache after the prompts, in calls of `size` tokens; end_prompt is not sent.

    `outs`, if given, gets the attention of every call and layer.
    """
    state = pipeline.init(data.spec, len(data.lengths))
    hidden = data.layers[0][0]["hidden"].shape[-1]
    tell_random(pipeline, state, data.spec, hidden, 0)
    for low in range(0, max(data.lengths), size):
        spans = [(min(low, n), min(low + size, n)) for n in data.lengths]
        pipeline.begin(state, [high - low for low, high in spans], "prompt")
        attended = []
        for index, layer in enumerate(data.layers):
            packed = {
                name: torch.cat([_cut(x[name], *s) for x, s in zip(layer, spans, strict=True)], -2)
                for name in layer[0]
            }
            attended.append(pipeline.attend(state, index, **packed))
        pipeline.commit(state)
        if outs is not None:
            outs.append(attended)
    return state


def end_prompt(pipeline: CachePipeline, state: CacheState, data: Data, seen: int) -> None:
    """Ends the prompts. Where an eviction wants a replay, the tokens that are decoded next look
    back at the first `seen`."""
    if any(layer.eviction.replayed for layer in state.layers):
        with pipeline.replay(state, span=range(seen)) as fork:
            pipeline.begin(fork, [data.steps] * state.batch, "prompt")
            for index, layer in enumerate(data.layers):
                rows = list(zip(layer, data.lengths, strict=True))
                packed = {
                    name: torch.cat([_cut(x[name], n, n + data.steps) for x, n in rows], -2)
                    for name in layer[0]
                }
                pipeline.attend(fork, index, **packed)
            pipeline.commit(fork)
    pipeline.end_prompt(state)


def decode(pipeline: CachePipeline, state: CacheState, data: Data) -> list[Tensor]:
    """Outputs `[B, Hq, 1, D]` of every decoded token and layer."""
    outs = []
    for step in range(data.steps):
        pipeline.begin(state, [1] * state.batch, "decode")
        for index in range(len(data.layers)):
            outs.append(pipeline.attend(state, index, **decoded(data, index, step)))
        pipeline.commit(state)
    return outs


def decoded(data: Data, layer: int, step: int) -> dict[str, Tensor]:
    """The inputs of one layer at a decode step."""
    rows = list(zip(data.layers[layer], data.lengths, strict=True))
    return {
        name: torch.stack([_cut(x[name], n + step, n + step + 1) for x, n in rows])
        for name in data.layers[layer][0]
    }


def _cut(tensor: Tensor, low: int, high: int) -> Tensor:
    return tensor[..., low:high, :]


def kept(state: CacheState, rows: Iterable[int]) -> list[list[int]]:
    """Positions held by each layer, sequence and head."""
    heads = range(state.spec.kv_heads)
    layers = range(state.spec.layers)
    return [state.kept(x, row, h).tolist() for x in layers for row in rows for h in heads]
