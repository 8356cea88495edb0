"""Memory that a cache of the reference holds for a while: pages that move are not held twice."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kvpolicy import CachePipeline, CacheSpec, SnapKV
from kvpolicy.store.pool import PagePool
from kvpolicy.store.trimming import trim

LAYERS, HEADS, DIM, TOKENS = 12, 2, 32, 600
SPEC = CacheSpec(layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim=DIM)
FULL = LAYERS * HEADS * TOKENS * 2 * DIM * 4  # bytes of every token's keys and values

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts a CPU's memory")


def most_held(act) -> int:
    """The most bytes that `act` held of what the CPU's allocator had given it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        act()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def prompt(pipeline, state, count):
    pipeline.begin(state, [count], "prompt")
    for layer in range(LAYERS):
        pipeline.attend(state, layer, *(torch.randn(HEADS, count, DIM) for _ in range(3)))
    pipeline.commit(state)


def test_an_eviction_at_the_prompts_end_holds_no_second_cache():
    eviction = SnapKV(budget=TOKENS // 2, observation=16)
    pipeline = CachePipeline(eviction=eviction, window=16, backend="reference")
    state = pipeline.init(SPEC)

    # The cache, its ring and what a layer computes with; then twice a layer's keys and values.
    assert most_held(lambda: prompt(pipeline, state, TOKENS)) < 1.3 * FULL
    assert most_held(lambda: pipeline.end_prompt(state)) < FULL * 2 / LAYERS
    assert state.layers[0].counts.tolist() == [[TOKENS // 2 - 16] * HEADS]


def test_a_next_prompt_holds_no_second_cache():
    pipeline = CachePipeline(window=16, backend="reference")
    state = pipeline.init(SPEC)

    def act():
        prompt(pipeline, state, TOKENS)
        prompt(pipeline, state, TOKENS // 6)

    # The cache with a sixth more, and keys or values a second time.
    assert most_held(act) < 1.85 * FULL


def test_trimming_that_is_broken_off_leaves_a_pool_that_is_right(monkeypatch):
    pool = PagePool(
        page_size=4, head_dim=8, dtype=torch.float32, device=torch.device("cpu"), summary=None,
        moving=True, copy=lambda *_: None,
    )  # fmt: skip
    ids = pool.take(500)
    pool.release(ids[40:])
    monkeypatch.setattr(PagePool, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trim(pool)
    monkeypatch.undo()
    assert pool.used == 40 and pool.available == pool.capacity - 41
    assert pool.take(400).numel() == 400
    assert all(len(store) >= pool.capacity for store in pool.extents[0] if store is not None)
