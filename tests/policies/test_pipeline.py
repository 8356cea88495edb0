"""What a pipeline says of itself when it is built: its window, budgets that hold it, a value."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    Adaptive,
    AtPromptEnd,
    BackendError,
    CachePipeline,
    CacheSpec,
    KeepAll,
    LocalAttention,
    Pyramid,
    Quest,
    RandomGate,
    SnapKV,
    Tokens,
    per_layer,
)

SPEC = CacheSpec(layers=1, heads=2, kv_heads=1, head_dim=8)
LOCAL = LocalAttention(window=7)


def test_where_the_window_comes_from():
    assert CachePipeline().window == 256
    assert CachePipeline(admission=RandomGate(sparsity=0.5)).window == 256
    assert CachePipeline(admission=LOCAL).window == 7
    assert CachePipeline(eviction=AtPromptEnd(LOCAL)).window == 7
    assert CachePipeline(admission=LOCAL, window=7).window == 7
    assert CachePipeline(window=1).window == 1


def test_an_eviction_prefers_a_window():
    """SnapKV's own is its observation; what is demanded goes before."""
    snap = SnapKV(budget=64, observation=16)
    assert CachePipeline(eviction=SnapKV(budget=64)).window == 32
    assert CachePipeline(eviction=snap, admission=RandomGate(sparsity=0.5)).window == 16
    assert CachePipeline(eviction=snap, admission=LOCAL).window == 7
    assert CachePipeline(eviction=snap, window=9).window == 9
    mixed = per_layer(snap, {0: SnapKV(budget=64, observation=24), 1: KeepAll()})
    assert CachePipeline(eviction=mixed).window == 24
    at_end = per_layer(snap, {0: AtPromptEnd(LOCAL)})
    assert CachePipeline(eviction=at_end).window == 7


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"admission": LOCAL, "window": 8}, "window says 8, admission says 7"),
        ({"eviction": AtPromptEnd(LOCAL), "window": 8}, "window says 8, eviction says 7"),
        (
            {"admission": LocalAttention(window=9), "eviction": AtPromptEnd(LOCAL)},
            "admission says 9, eviction says 7",
        ),
    ],
)
def test_windows_that_disagree(parts, said):
    with pytest.raises(ValueError, match=f"disagree: {said}"):
        CachePipeline(**parts)


@pytest.mark.parametrize(
    ("slot", "make"),
    [
        ("selection", lambda n: Quest(budget=n)),
        ("eviction", lambda n: SnapKV(budget=n)),
        ("eviction", lambda n: SnapKV(budget=Adaptive(Tokens(n)))),
        ("eviction", lambda n: SnapKV(budget=Pyramid(Adaptive(Tokens(n))))),
    ],
)
def test_a_budget_that_cannot_hold_the_window_fails_at_once(slot, make):
    CachePipeline(window=7, **{slot: make(8)})
    with pytest.raises(ValueError, match=r"budget: wanted at least window \+ 1 = 8 .*, got 7"):
        CachePipeline(window=7, **{slot: make(7)})


def test_a_pipeline_is_a_value():
    one, other = (CachePipeline(admission=LOCAL, selection=Quest(budget=16)) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != attrs.evolve(one, selection=Quest(budget=17))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.window = 3


def test_a_backend_that_cannot_run_raises(monkeypatch):
    """An explicit choice never falls back."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="kernels need a CUDA device"):
        CachePipeline(backend="triton").init(attrs.evolve(SPEC, device=torch.device("cpu")))
    assert CachePipeline().init(SPEC).ops.backend == "reference"
