"""Kernel launches and host syncs of the cache's part of a decode step and of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..admission import DuoAttention
from ..budget import Tokens
from ..eviction import SnapKV
from ..pipeline import CachePipeline
from ..selection import Quest, SelectAll
from ..spec import CacheSpec
from ..store import CacheState
from .context import Bench, Case
from .gates import random_gate
from .launch_counts import interpreted_launches, profiled
from .rows import Goal, Row

LAYERS, STEPS = 4, 8
PROMPT = 500  # tokens
# Launches a layer of a first prompt and of the next, by what manages the cache.
WANTED = {
    "gate": (10, 10),
    "everything admitted": (6, 10),
    "gate + Quest": (11, 11),
    "gate + SnapKV": (12, 13),
    "DuoAttention": (10, 10),
}


def decode_state(
    pipeline: CachePipeline, spec: CacheSpec, prompt: int
) -> tuple[CacheState, dict[str, torch.Tensor]]:
    """A cache after a random prompt, with room for the steps to come, and a token's tensors."""
    state = pipeline.init(spec)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=spec.dtype, device=spec.device)

    packed = {n: normal(spec.kv_heads, prompt, spec.head_dim) for n in ("key", "value", "key_pre")}
    packed["query"] = normal(spec.heads, prompt, spec.head_dim)
    pipeline.begin(state, [prompt], "prompt")
    for layer in range(spec.layers):
        pipeline.attend(state, layer, **packed)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    state.widen(prompt + 2 * STEPS)
    pipeline.reserve(state, 2 * STEPS)
    return state, {name: x[None, :, -1:].contiguous() for name, x in packed.items()}


def step(pipeline: CachePipeline, state: CacheState, token: dict[str, torch.Tensor]) -> None:
    """The cache's part of one eager decode step."""
    pipeline.begin(state, [1] * state.batch, "decode")
    for layer in range(state.spec.layers):
        pipeline.attend(state, layer, **token)
    pipeline.commit(state)


def launches(bench: Bench, case: str, quest: bool) -> Iterator[Row]:
    """Launches a layer, and host syncs a step, of gate, write, choice and attention."""
    kv_heads, dim, window = bench.pick(8, 2), bench.pick(128, 32), bench.pick(256, 16)
    layers = bench.pick(LAYERS, 2)
    gate = random_gate(layers, kv_heads, bench.pick(512, 32), dim, window, bench.device)
    selection = Quest(budget=Tokens(bench.pick(1024, 48))) if quest else SelectAll()
    pipeline = CachePipeline(admission=gate, selection=selection, backend="triton")
    spec = CacheSpec(
        layers=layers, heads=4 * kv_heads, kv_heads=kv_heads, head_dim=dim, dtype=bench.dtype,
        device=bench.device,
    )  # fmt: skip
    state, token = decode_state(pipeline, spec, bench.pick(8192, 80))
    step(pipeline, state, token)
    wanted, steps = 7 if quest else 5, bench.pick(STEPS, 1)
    counts: Counter[str] = Counter()
    if bench.device.type == "cuda":
        with profiled() as counts:
            for _ in range(steps):
                step(pipeline, state, token)
        total = counts["kernels"] + counts["copies"] + counts["reads"]
    else:
        with interpreted_launches() as launched:
            step(pipeline, state, token)
        total = len(launched)
    each, beside = divmod(total, steps * layers)
    yield Row(
        group="launches", name=case, value=each, unit="launches a layer",
        shape=f"{layers} layers, {steps} steps",
        goals=(
            Goal(what="launches", wanted=wanted, got=each),
            Goal(what="syncs a step", wanted=0, got=counts["syncs"] / steps),
        ),
        note=f"{beside / steps:.3g} a step beside" if counts else "Triton only, interpreted",
        extra=dict(counts),
    )  # fmt: skip


def prompt_launches(bench: Bench, case: str, policy: str) -> Iterator[Row]:
    """Launches a layer of a short prompt and of a second one after it, with their attention.

    The first layer also plans for the others, and is left out.
    """
    kv_heads, dim, window = bench.pick(8, 2), bench.pick(128, 32), bench.pick(256, 16)
    layers, tokens = bench.pick(LAYERS, 3), bench.pick(PROMPT, 60)
    parts: dict[str, Any] = {"window": window}
    if policy == "DuoAttention":
        full = [head % 2 == 0 for head in range(kv_heads)]
        parts = {"admission": DuoAttention(full_heads=[full] * layers, window=window)}
    elif policy != "everything admitted":
        gate = random_gate(layers, kv_heads, bench.pick(512, 32), dim, window, bench.device)
        parts = {"admission": gate}
    if policy == "gate + Quest":
        parts["selection"] = Quest(budget=Tokens(bench.pick(1024, 48)))
    elif policy == "gate + SnapKV":
        parts["eviction"] = SnapKV(budget=Tokens(bench.pick(1024, 48)), observation=window)
    pipeline = CachePipeline(backend="triton", **parts)
    spec = CacheSpec(
        layers=layers, heads=4 * kv_heads, kv_heads=kv_heads, head_dim=dim, dtype=bench.dtype,
        device=bench.device,
    )  # fmt: skip
    packed = {n: bench.randn(kv_heads, tokens, dim) for n in ("key", "value", "key_pre")}
    packed["query"] = bench.randn(4 * kv_heads, tokens, dim)
    cuda = bench.device.type == "cuda"
    counted: dict[str, tuple[float, Counter[str]]] = {}
    for _ in range(bench.pick(2, 1)):  # kernels compile in the first round
        state = pipeline.init(spec)
        for part in ("first", "next"):
            pipeline.begin(state, [tokens], "prompt")
            pipeline.attend(state, 0, **packed)
            with profiled() if cuda else interpreted_launches(operations=True) as found:
                for layer in range(1, layers):
                    pipeline.attend(state, layer, **packed)
            counts = found if isinstance(found, Counter) else Counter(kernels=len(found))
            total = counts["kernels"] + counts["copies"] + counts["reads"]
            counted[part] = total / (layers - 1), counts
            pipeline.commit(state)
    for part, (each, counts) in counted.items():
        yield Row(
            group="launches", name=f"{case}, {part} {tokens} tokens", value=each,
            unit="launches a layer", shape=f"{layers} layers",
            goals=(
                Goal(what="launches", wanted=WANTED[policy][part == "next"], got=each),
                Goal(what="reads", wanted=0, got=counts["reads"]),
            ),
            note="" if cuda else "as on a device, interpreted", extra=dict(counts),
        )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    plain, chosen = "decode, cache's part", "decode, cache's part + Quest"
    found = [
        Case(group="launches", name=plain, run=lambda b: launches(b, plain, False), rank=20),
        Case(group="launches", name=chosen, run=lambda b: launches(b, chosen, True), rank=20),
    ]
    for policy in WANTED:
        name = "prompt, cache's part" + ("" if policy == "gate" else f", {policy}")
        run = partial(prompt_launches, case=name, policy=policy)
        found.append(Case(group="launches", name=name, run=run, rank=20))
    return found
