"""Kernel launches and host syncs of the cache's part of a decode step."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ..budget import Tokens
from ..pipeline import CachePipeline
from ..selection import Quest, SelectAll
from ..spec import CacheSpec
from ..store import CacheState
from .context import Bench, Case
from .gates import random_gate
from .rows import Goal, Row

LAYERS, STEPS = 4, 8
REGION = "kvpolicy steps"
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@contextlib.contextmanager
def interpreted_launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched inside, where the interpreter runs them."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    original = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        yield launched
    finally:
        GridExecutor.__call__ = original


@contextlib.contextmanager
def profiled() -> Iterator[Counter[str]]:
    """Counts, filled on exit.

    On the device kernels, copies and reads (copies to the host); on the host syncs and graphs.
    """
    counts: Counter[str] = Counter()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with (
        torch.profiler.profile(activities=kinds, acc_events=True) as profile,
        torch.profiler.record_function(REGION),
    ):
        yield counts
    events = profile.events()
    cuda = torch.autograd.DeviceType.CUDA
    region = next(e.time_range for e in events if e.name == REGION and e.device_type != cuda)
    for event in events:
        name = event.name
        if event.device_type == cuda:
            if name.startswith("Memcpy DtoH"):
                counts["reads"] += 1
            elif name.startswith(("Memcpy", "Memset")):
                counts["copies"] += 1
            elif name != REGION:
                counts["kernels"] += 1
        elif region.start <= event.time_range.start <= region.end:
            counts["syncs"] += name in SYNCS
            counts["graphs"] += name == "cudaGraphLaunch"


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


def cases(bench: Bench) -> list[Case]:
    plain, chosen = "decode, cache's part", "decode, cache's part + Quest"
    return [
        Case(group="launches", name=plain, run=lambda b: launches(b, plain, False), rank=20),
        Case(group="launches", name=chosen, run=lambda b: launches(b, chosen, True), rank=20),
    ]
