"""Regression guards that need neither a GPU nor a clock: launches, visited tiles, allocations."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy import (
    H2O,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    LocalAttention,
    Quest,
    RandomGate,
    SnapKV,
)
from kvpolicy.admission import Write
from kvpolicy.bench.context import Bench
from kvpolicy.bench.gates import random_gate
from kvpolicy.bench.launch_counts import interpreted_launches
from kvpolicy.bench.launches import decode_state, step
from kvpolicy.bench.prefill import problem
from kvpolicy.calls.prompt import segments_of, write_prompt
from kvpolicy.kernels import sparse_prefill as sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted launches")

LAYERS, DIM, HEADS, WINDOW = 2, 32, 2, 16
SPEC = CacheSpec(layers=LAYERS, heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM)
GATE = random_gate(LAYERS, HEADS, 32, DIM, WINDOW, torch.device("cpu"))
WRITE, ATTEND = ["_decode_write"], ["_split", "_reduce"]
DECIDE, SELECT = ["_chunks", "_finish"], ["_quest_scores", "_top_pages"]
OBSERVER = SnapKV(budget=400, observation=8, when="decode")


def make(backend: str = "triton", **parts: Any) -> CachePipeline:
    named = {"admission", "eviction"} & set(parts)
    parts = {"window": None if named else WINDOW} | parts
    return CachePipeline(backend=backend, **parts)


launches = functools.partial(interpreted_launches, operations=True)


@pytest.mark.parametrize(
    ("pipeline", "wanted"),
    [
        (make(), WRITE + ATTEND),
        (make(admission=LocalAttention(window=WINDOW, sinks=4)), ["lt", *WRITE, *ATTEND]),
        (make(eviction=AtPromptEnd(GATE, generated="keep")), WRITE + ATTEND),
        (make(eviction=AtPromptEnd(GATE)), DECIDE + WRITE + ATTEND),
        (make(admission=GATE), DECIDE + WRITE + ATTEND),
        (make(admission=GATE, selection=Quest(budget=32)), DECIDE + WRITE + SELECT + ATTEND),
        (make(admission=GATE, eviction=OBSERVER), DECIDE + WRITE + ATTEND),
        (
            make(admission=GATE, selection=Quest(budget=32), eviction=OBSERVER),
            DECIDE + WRITE + SELECT + ATTEND,
        ),
    ],
    ids=["dense", "local", "keep", "at end", "gate", "gate + quest", "gate + snapkv", "all three"],
)
def test_launches_of_a_decode_layer(pipeline: CachePipeline, wanted: list[str]) -> None:
    state, token = decode_state(pipeline, SPEC, 48)
    pipeline.begin(state, [1], "decode")
    with launches() as launched:
        for layer in range(LAYERS):
            pipeline.attend(state, layer, **token)
    assert launched == wanted * LAYERS
    assert len(wanted) <= (5 if pipeline.selection.neutral else 7)


WHOLE = ["_scaled_dot_product_flash_attention_for_cpu"]  # one launch of another name on a device
RING, STORE = ["_advance"], ["_scan", "_store", "_settle"]
TILES = ["_gather", "_limits", "_attend"]
GATED = [*DECIDE, *RING, *STORE, *TILES]
# Dense kernels want earlier tokens and new ones in a row, and on a CPU a mask.
JOINED = [*RING, *STORE, "_read_pages", "cat", "cat", "new_full", "triu_", *WHOLE]
CHOSEN = [*DECIDE, *RING, *STORE, "_write_minmax", *TILES]
MARKED = [*DECIDE, "bitwise_or", *RING, *STORE, *TILES, "index_copy_"]


@pytest.mark.parametrize(
    ("rows", "pipeline", "first", "then"),
    [
        (1, make(), [*RING, *STORE, *WHOLE], JOINED),
        (3, make(), None, [*RING, *STORE, *TILES]),
        (1, make(admission=GATE), GATED, GATED),
        (3, make(admission=GATE), GATED, GATED),
        (1, make(admission=GATE, selection=Quest(budget=32)), CHOSEN, CHOSEN),
        (1, make(admission=GATE, eviction=OBSERVER), MARKED, None),
    ],
    ids=["dense", "dense batch", "gate", "gate batch", "gate + quest", "snapkv"],
)
def test_launches_of_a_prompt_layer(
    rows: int, pipeline: CachePipeline, first: list[str] | None, then: list[str] | None
) -> None:
    """Of a first prompt and of one after it, in the layer after the one that planned for both."""
    state = pipeline.init(SPEC, rows)
    count = WINDOW + 6
    for wanted in (first, then) if then else (first,):
        tokens = {n: torch.randn(HEADS, count * rows, DIM) for n in ("key", "value")}
        tokens["query"] = torch.randn(2 * HEADS, count * rows, DIM)
        if "key_pre" in pipeline.reads:
            tokens["key_pre"] = tokens["key"]
        pipeline.begin(state, [count] * rows, "prompt")
        pipeline.attend(state, 0, **tokens)
        with launches() as launched:
            pipeline.attend(state, 1, **tokens)
        pipeline.commit(state)
        assert wanted is None or launched == wanted
        assert not wanted or len(wanted) <= 11


def test_launches_of_a_prompt_layer_with_numbers() -> None:
    """What they share is made by the layer before: places of tokens, slots of rings."""
    pipeline = make(eviction=H2O(budget=64), window=WINDOW)
    state = pipeline.init(SPEC, 3)
    tokens = {n: torch.randn(HEADS, 66, DIM) for n in ("key", "value")}
    tokens["query"] = torch.randn(2 * HEADS, 66, DIM)
    pipeline.begin(state, [22] * 3, "prompt")
    pipeline.attend(state, 0, **tokens)
    with launches() as launched:
        pipeline.attend(state, 1, **tokens)
    assert "repeat_interleave" not in launched and "remainder" not in launched
    assert len(launched) <= 47


def test_launches_of_an_eviction() -> None:
    """What another layer adds to a prompt's end: four kernels of its scores, one of its choice."""
    found = []
    for layers in (1, 2):
        pipeline = make(eviction=SnapKV(budget=40, observation=8), window=WINDOW)
        state = pipeline.init(attrs.evolve(SPEC, layers=layers))
        tokens = {n: torch.randn(HEADS, 60, DIM) for n in ("key", "value")}
        tokens["query"] = torch.randn(2 * HEADS, 60, DIM)
        pipeline.begin(state, [60], "prompt")
        for layer in range(layers):
            pipeline.attend(state, layer, **tokens)
        pipeline.commit(state)
        with launches() as launched:
            pipeline.end_prompt(state)
        found.append(Counter(launched))
    assert (found[1] - found[0]).total() <= 11
    assert found[0].total() <= 80


def test_launches_of_a_hash() -> None:
    write = Write(torch.empty(HEADS, 9, 0), torch.empty(0), torch.arange(9), None, 1, range(HEADS))
    RandomGate(sparsity=0.5).admit(write)  # hashes the heads
    with launches() as launched:
        RandomGate(sparsity=0.5).admit(write)
    assert len(launched) <= 15


def test_writing_a_prompt_keeps_nothing_as_long_as_the_prompt() -> None:
    tokens, most = 1600, 10
    pipeline = make(admission=GATE)
    state = pipeline.init(SPEC)
    pipeline.begin(state, [tokens], "prompt")
    layer = state.layers[0]
    call = state.call
    segments = segments_of(state, call, layer)
    layer.pool.provide(2 * HEADS * tokens // SPEC.page_size)  # growing allocates
    key, value = torch.randn(2, HEADS, tokens, DIM)
    flags = torch.randint(2, (HEADS, tokens), dtype=torch.uint8)
    with Allocations() as made, launches() as launched:
        write_prompt(state, call, layer, segments, key, value, flags)
    assert {"_scan", "_store"} <= set(launched) and len(launched) <= most
    assert int(layer.counts.sum()) == int(flags[:, : tokens - WINDOW].sum())
    assert made.bytes <= HEADS * tokens


def test_a_prompt_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make(admission=GATE)
    state = pipeline.init(SPEC)
    reads: list[str] = []

    def counting(name: str, read: Any) -> Any:
        return lambda *a: (reads.append(name), read(*a))[1]

    for start in (0, 150):
        pipeline.begin(state, [150], "prompt")
        tokens = {"query": torch.randn(2 * HEADS, 150, DIM)}
        tokens |= {name: torch.randn(HEADS, 150, DIM) for name in ("key", "value", "key_pre")}
        with launches(), monkeypatch.context() as patch:
            for name in ("tolist", "item", "nonzero", "__int__", "__bool__", "__float__"):
                patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
            for layer in range(LAYERS):
                pipeline.attend(state, layer, **tokens)
        pipeline.commit(state)
        assert state.lengths == [start + 150] and int(state.layers[0].counts.min()) > 0
    assert reads == ["tolist"] * 2  # once a call


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("start", "rate"), [(0, 0.25), (192, 0.25), (192, 1.0), (0, 0.0)])
def test_prefill_visits_few_pairs_in_vain(
    start: int, rate: float, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(Bench(quick=True, seconds=60), 384, [rate], 16, start)
    p = attrs.evolve(p, query=p.query[:heads])
    tile = sparse.Tile(64, 32, 4, 2)
    monkeypatch.setattr(sparse, "choose_tile", lambda *_: tile)
    steps, original = Counter(), sparse.attend_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps["all"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(sparse, "attend_step", counted)
    sparse.prefill_attention(p.query, *p.recent, p.segments, p.pages, p.heads, p.window, p.scale)
    visited = steps["all"] * tile.rows * tile.keys
    # A tile may waste one block of far keys, and of the band a block at each end and a triangle.
    waste = (384 - start) * heads * (3 * tile.keys + tile.rows // heads)
    assert p.pairs() <= visited <= p.pairs() + waste


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {_storage(x): x for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        self.bytes += sum(
            x.untyped_storage().nbytes() for key, x in made.items() if key not in given
        )
        return out


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def allocated(pipeline: CachePipeline, prompt: int) -> int:
    state, token = decode_state(pipeline, SPEC, prompt)
    step(pipeline, state, token)
    with Allocations() as found:
        step(pipeline, state, token)
    return found.bytes


@pytest.mark.parametrize("selection", [{}, {"selection": Quest(budget=64)}], ids=["all", "quest"])
def test_a_decode_step_of_the_reference_allocates_little(selection: dict[str, Any]) -> None:
    pipeline = make("reference", **selection)
    short, long = allocated(pipeline, 200), allocated(pipeline, 1400)
    stored = LAYERS * HEADS * 2 * DIM * 4  # bytes of keys and values a token
    # It copies the pages that it reads (or only summaries) once, beside scores.
    most = 0.4 if selection else 1.5
    assert long - short <= most * 1200 * stored
    assert short <= 3 * (200 + WINDOW + SPEC.rollback) * stored


def test_a_decode_step_of_the_kernels_allocates_the_same_at_any_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.fn.__name__ in ("_count", "_scan"):
            original(self, *args, **kwargs)

    # Kernels are left out, but for those whose result sizes the pool: the interpreter copies
    # tensors, a device does not.
    monkeypatch.setattr(GridExecutor, "__call__", counting)
    pipeline = make(admission=GATE)
    sizes = []
    for prompt in (100, 2000):
        state, token = decode_state(pipeline, SPEC, prompt)
        with Allocations() as found:
            step(pipeline, state, token)
        sizes.append(found.bytes)
    assert sizes[0] == sizes[1] <= 64 << 10
