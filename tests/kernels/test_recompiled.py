"""Prompts of other lengths, and batches of about the same size, run the kernels compiled before."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, Quest, SnapKV
from kvpolicy.bench.gates import random_gate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at interpreted launches")

LAYERS, HEADS, DIM, WINDOW = 2, 3, 32, 16
SPEC = CacheSpec(layers=LAYERS, heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM)
GATE = random_gate(LAYERS, HEADS, 32, DIM, WINDOW, torch.device("cpu"))
Compiled = dict[str, set[tuple[Any, ...]]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """What a device would have compiled, by kernel; nothing runs."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend
    from triton.runtime.interpreter import InterpretedFunction

    found: Compiled = defaultdict(set)

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | named
        plain = self.kwargs.get("do_not_specialize") or ()
        unaligned = self.kwargs.get("do_not_specialize_on_alignment") or ()
        fixed = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}

        def kind(name: str) -> Any:
            if name in fixed or name not in self.arg_names:  # options of the compiler are no names
                return given[name]
            where = name not in plain, name not in unaligned
            return native_specialize_impl(BaseBackend, given[name], False, *where)

        found[self.fn.__name__].add(tuple((name, kind(name)) for name in sorted(given)))

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    return found


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


def new(compiled: Compiled, before: Compiled) -> dict[str, int]:
    """How many variants of which kernels were not there before."""
    found = {name: len(kinds - before.get(name, set())) for name, kinds in compiled.items()}
    return {name: count for name, count in found.items() if count}


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
    prompt(pipeline, 3, 64, 64)
    before = {name: set(kinds) for name, kinds in compiled.items()}
    assert {"_advance", "_scan", "_store", "_settle", "_attend"} <= set(before)
    for rows, lengths in ((3, (49, 33)), (4, (65, 128)), (4, (1001, 17))):
        prompt(pipeline, rows, *lengths)
    assert new(compiled, before) == {}
    prompt(pipeline, 5, 64)  # padded to 8
    assert "_attend" in new(compiled, before) or pipeline.admission.neutral
