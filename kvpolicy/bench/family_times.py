"""Decode steps of model types: beside transformers' own caches, and beside a Llama's kernels."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..pipeline import CachePipeline
from .context import Bench
from .families import FAMILIES, build
from .family_kernels import LENGTHS, READ, WINDOW, kernels, llama, windows
from .gates import FixedFraction, random_gate

FRACTION = 0.25
STEPS, WARM = 48, 8
FATAL = ("device-side assert", "illegal memory access", "unspecified launch failure")


def times(bench: Bench, name: str, told: Callable[[dict[str, Any]], None]) -> None:
    """Tells, for each length, the step with each cache and the time of the cache's kernels."""
    model = build(bench, name)
    family = FAMILIES[name]
    for length in bench.pick(LENGTHS, (48,)):
        ids = torch.randint(20, 100, (1, length), device=bench.device)
        found: dict[str, Any] = {"tokens": length}
        chunk = bench.pick(family.prompt, 16)
        plain = functools.partial(_dynamic, bench, model, ids, chunk)
        found["dynamic"] = _tried(plain)
        for word, pipeline in _pipelines(bench, model, length):
            call = functools.partial(_ours, bench, model, ids, pipeline, word)
            found |= _tried(call, {word: None})
        found["static"] = _tried(functools.partial(_static, bench, model, ids, chunk))
        found["peak"] = _peak(bench)
        told(found)
    _clean(bench)
    layers = windows(model)
    del model
    _clean(bench)
    told(llama(bench, name, layers))


def _tried(call: Callable[[], Any], otherwise: Any = None) -> Any:
    """What it returns, or why it failed: one way that fails does not cost the others."""
    gc.collect()
    try:
        return call()
    except Exception as error:
        if any(fatal in str(error) for fatal in FATAL):
            raise
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        return text if otherwise is None else {**otherwise, "error": text}


def _pipelines(bench: Bench, model: Any, length: int) -> Iterator[tuple[str, CachePipeline]]:
    from ..adapters.hf import attach

    window = bench.pick(WINDOW, 8)
    yield "dense", CachePipeline(window=window)
    with attach(model, CachePipeline()) as attached:
        spec = attached.spec
    gate = random_gate(
        spec.layers, spec.kv_heads, bench.pick(512, 16), spec.head_dim, window, bench.device
    )
    yield (
        "gate",
        CachePipeline(admission=FixedFraction.of(gate, FRACTION, length + 4 * (STEPS + WARM))),
    )


class _Clock:
    """A streamer that notes when tokens arrive on the host."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""

    @property
    def step(self) -> float:
        """Milliseconds between tokens, after those that warm up."""
        part = self.at[-1 - STEPS :]
        return 1e3 * (part[-1] - part[0]) / (len(part) - 1)


def _generated(bench: Bench, model: Any, ids: Tensor, cache: Any) -> float:
    """Milliseconds of generate's own step after `ids`, of which `cache` lacks the last column."""
    clock, count = _Clock(), bench.pick(STEPS + WARM, 4)
    model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=count, min_new_tokens=count,
        do_sample=False, streamer=clock, use_cache=True,
    )  # fmt: skip
    return clock.step


@torch.no_grad()
def _filled(model: Any, ids: Tensor, cache: Any, chunk: int) -> Any:
    for part in ids.split(chunk, 1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _dynamic(bench: Bench, model: Any, ids: Tensor, chunk: int) -> float:
    from transformers import DynamicCache

    cache = _filled(model, ids[:, :-1], DynamicCache(config=model.config), chunk)
    return _generated(bench, model, ids, cache)


@torch.no_grad()
def _static(bench: Bench, model: Any, ids: Tensor, chunk: int) -> float | str:
    """Milliseconds of a step of its static cache, as a CUDA graph of the uncompiled model."""
    from transformers import StaticCache

    if bench.device.type != "cuda":
        return "no CUDA device"
    room = ids.shape[1] + 2 * (STEPS + WARM)
    cache = _filled(model, ids, StaticCache(config=model.config, max_cache_len=room), chunk)
    token, position = ids[:, -1:].clone(), torch.full_like(ids[:, :1], ids.shape[1])

    def step() -> None:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(-1))
        position.add_(1)

    with _experts(model):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for _ in range(WARM):
        graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        graph.replay()
        token.tolist()  # as generate looks at every token
    return 1e3 * (time.perf_counter() - start) / STEPS


def _experts(model: Any) -> Any:
    """The experts' implementation that generate decodes with."""
    switch = getattr(model, "_optimize_model_for_decode", None)
    return nullcontext() if switch is None else switch()


def _ours(
    bench: Bench, model: Any, ids: Tensor, pipeline: CachePipeline, word: str
) -> dict[str, Any]:
    """Generate's step with a pipeline, how it ran, and the time of the cache's kernels in it."""
    from ..adapters.hf import attach

    with attach(model, pipeline) as attached:
        cache = attached.read(ids[:, :-1], chunk_size=bench.pick(_chunk(model), 16))
        found: dict[str, Any] = {word: _generated(bench, model, ids, cache)}
        found[f"{word} decoding"] = cache.decoding
        with _experts(model):
            each = kernels(bench, model, cache)
        found[f"{word} kernels"] = each.pop("all", 0.0)
        found[f"{word} by kernel"] = each
        found[f"{word} stored"] = max(n for layer in cache.report().stored for n in layer)
    return found


def _chunk(model: Any) -> int:
    """Columns of a forward: states of transformers' own have no memory for many."""
    family = next((f for f in FAMILIES.values() if f.type == model.config.model_type), None)
    return family.prompt if family is not None and _own(model) else READ


def _own(model: Any) -> bool:
    from ..adapters.hf.rule.kinds import layer_kinds

    return any(kind.own for kind in layer_kinds(model.config))


def _clean(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _peak(bench: Bench) -> int:
    if bench.device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
