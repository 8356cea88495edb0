"""Prompts of other lengths, and batches of about the same size, run the kernels compiled before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, Quest, SnapKV
from kvpolicy.bench.gates import random_gate
from tests.support.kernels.variants import Compiled, new, variants

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at interpreted launches")

LAYERS, HEADS, DIM, WINDOW = 2, 3, 32, 16
SPEC = CacheSpec(layers=LAYERS, heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM)
GATE = random_gate(LAYERS, HEADS, 32, DIM, WINDOW, torch.device("cpu"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """What a device would have compiled, by kernel; nothing runs."""
    return variants(monkeypatch, run=False)


def prompt(pipeline: CachePipeline, rows: int, *lengths: int) -> None:
    """Calls of so many tokens a sequence, one after the other."""
    state = pipeline.init(SPEC, rows)
    for count in lengths:
        tokens = {n: torch.randn(HEADS, count * rows, DIM) for n in ("key", "value")}
        tokens["query"] = torch.randn(2 * HEADS, count * rows, DIM)
        if "key_pre" in pipeline.reads:
            tokens["key_pre"] = tokens["key"]
        pipeline.begin(state, [count] * rows, "prompt")
        for layer in range(LAYERS):
            pipeline.attend(state, layer, **tokens)
        pipeline.commit(state)


@pytest.mark.parametrize(
    "parts",
    [
        {"admission": GATE},
        {"eviction": SnapKV(budget=64), "window": WINDOW},
        {"admission": GATE, "selection": Quest(budget=64)},
    ],
    ids=["gate", "snapkv", "gate + quest"],
)
def test_other_lengths_and_batches_compile_nothing(parts: dict[str, Any], compiled) -> None:
    pipeline = CachePipeline(backend="triton", **parts)
    for rows in (1, 3):  # one sequence has kernels of its own, several share theirs
        prompt(pipeline, rows, 64, 64)
    before = {name: set(kinds) for name, kinds in compiled.items()}
    assert {"_advance", "_scan", "_store", "_settle", "_attend"} <= set(before)
    for rows, lengths in ((1, (49, 33)), (16, (65, 128)), (4, (1001, 17))):
        prompt(pipeline, rows, *lengths)
    assert new(compiled, before) == {}
    prompt(pipeline, 17, 64)  # padded to 32
    assert "_attend" in new(compiled, before) or pipeline.admission.neutral
