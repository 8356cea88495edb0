"""A step of gate training at the shape of Llama-3.1-8B: seconds and peak memory."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator

import torch

from .context import Bench, Case
from .model import SHAPES, build
from .rows import Goal, Row

LENGTHS = (8192, 16384, 32768)
STEPS = 4  # the first one compiles
GPU = 80e9  # bytes
ABOUT = {8192: 60.0, 16384: 80.0, 32768: 140.0}  # seconds of a case


def rows(bench: Bench, length: int) -> Iterator[Row]:
    """Seconds a step and peak memory of training the write gates on one sequence of `length`."""
    from ..training.data import Batch, TrainingMix
    from ..training.train import train_write_gate

    model = build(bench, SHAPES[0])
    vocabulary = model.config.vocab_size

    class RandomText(TrainingMix):
        """Batches of random tokens; no tokenizer is asked."""

        def __init__(self, length: int) -> None:
            object.__setattr__(self, "length", length)

        def batch(self, index: int, size: int, *, rank: int = 0) -> Batch:
            made = torch.Generator().manual_seed(1000 * rank + index)
            ids = torch.randint(1, vocabulary, (size, self.length), generator=made)
            return Batch(ids, torch.zeros_like(ids, dtype=torch.bool))

    cuda, tokens = bench.device.type == "cuda", bench.pick(length, 64)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    took: list[float] = []
    train_write_gate(
        model, RandomText(tokens), steps=STEPS, lam=0.1, window=bench.pick(256, 8), batch_size=1,
        progress=lambda found: took.append(found["seconds"]),
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    seconds = statistics.median(took[1:])
    name = f"gate of {SHAPES[0]}, {length // 1024}K"
    yield Row(
        group="training", name=f"{name}: step", value=seconds, unit="s",
        shape=f"1 x {tokens} tokens", note=f"1000 steps {1000 * seconds / 3600:.1f} hours, "
        f"first step {took[0]:.1f} s",
    )  # fmt: skip
    if peak:
        yield Row(
            group="training", name=f"{name}: memory", value=peak / 1e9, unit="GB",
            goals=(Goal(what="GB", wanted=GPU / 1e9, got=peak / 1e9),),
        )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    return [
        Case(
            group="training", name=f"gate, {length // 1024}K tokens a step", rank=90 + place,
            run=functools.partial(_case, length), seconds=ABOUT[length],
        )
        for place, length in enumerate(bench.pick(LENGTHS, LENGTHS[:1]))
    ]  # fmt: skip


def _case(length: int, bench: Bench) -> Iterator[Row]:
    return rows(bench, length)
