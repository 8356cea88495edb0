"""Short prompts beside plain transformers: time to the first token of `generate`, and launches."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from .context import Bench, Case
from .launch_counts import profiled
from .model import SHAPES, Setting, build, pipeline_of, wait
from .rows import Goal, Row

OF_PLAIN = {500: 1.0, 2000: 0.85, 8000: 0.8}  # what a compiled gate may take, by tokens
LAUNCHES = 45  # a layer of a prompt, as plain transformers has them
RUNS = 7
PLAIN = "plain transformers"
# What is attached, and whether layers are compiled.
WAYS: dict[str, tuple[str, bool] | None] = {
    PLAIN: None,
    "gate, eager layers": ("gate", False),
    "gate": ("gate", True),
    "everything admitted": ("dense", True),
}


def rows(bench: Bench) -> Iterator[Row]:
    """Medians of `generate` of one token, every length with every way."""
    from ..adapters.hf import attach

    model, plain = build(bench, SHAPES[0]), dict[int, float]()
    lengths = bench.pick(tuple(OF_PLAIN), (24, 40))
    for way, how in WAYS.items():
        with contextlib.ExitStack() as stack:
            if how is not None:
                pipeline = pipeline_of(bench, Setting(policy=how[0], tokens=max(lengths)))
                # Tiny shapes would spend minutes in the compiler.
                stack.enter_context(attach(model, pipeline, compile=how[1] and not bench.quick))
            for length in lengths:
                ms, counts = _first_token(bench, model, length)
                plain.setdefault(length, ms)
                yield _row(bench, way, length, ms, plain[length], counts)


def _first_token(bench: Bench, model: Any, length: int) -> tuple[float, Counter[str]]:
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=bench.device)

    def call() -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False
        ).tolist()

    for _ in range(bench.pick(3, 1)):
        call()
    found = []
    for _ in range(bench.pick(RUNS, 1)):
        wait(bench)
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    counts = Counter[str]()
    if bench.device.type == "cuda":
        with profiled() as counts:
            call()
    return statistics.median(found), counts


def _row(bench: Bench, way: str, length: int, ms: float, plain: float, counts: Counter[str]) -> Row:
    goals, launched = list[Goal](), counts["kernels"] + counts["copies"] + counts["reads"]
    layers = build(bench, SHAPES[0]).config.num_hidden_layers
    if way == "gate" and length in OF_PLAIN:
        goals.append(Goal(what="of plain", wanted=OF_PLAIN[length], got=ms / plain))
    if way == "gate" and launched:
        goals.append(Goal(what="launches a layer", wanted=LAUNCHES, got=launched / layers))
    return Row(
        group="prompts", name=f"{way}, {length} tokens", value=ms, goals=tuple(goals),
        baseline="" if way == PLAIN else f"{plain / ms:.2f}x plain {plain:.4g} ms",
        note=f"{launched} launches" if launched else "", extra=dict(counts),
    )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    """One, since all lengths share a compiled model."""
    return [Case(group="prompts", name="short prompts", run=rows, seconds=150, rank=58)]
