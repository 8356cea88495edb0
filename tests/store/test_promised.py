"""Pages for all layers of a short prompt call: asked for once, promised to it, then anybody's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec
from kvpolicy.calls import prompt_pages
from kvpolicy.ops import load
from kvpolicy.selection import Quest
from kvpolicy.store.extents import SLAB_PAGES
from kvpolicy.store.fork import select_rows
from kvpolicy.store.pool import PagePool
from tests.support.store.room import (
    CHUNK,
    DEVICE,
    HEADS,
    LAYERS,
    SIZE,
    check_pages,
    filled,
    layers,
    near_a_cap,
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Leaves attention out, which interpreted kernels spend their time on."""
    for name in ("prefill_attention", "paged_decode"):
        monkeypatch.setattr(load("triton"), name, lambda q, *_, **__: q, raising=False)


@pytest.fixture
def reads(monkeypatch):
    """How often the host read from the device, by layers that provided for themselves."""
    found = Counter()
    for name in ("tolist", "__int__", "__bool__", "item"):
        read = getattr(torch.Tensor, name)

        def counting(*args, _name=name, _read=read):
            found[_name] += 1
            return _read(*args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    return found


@pytest.mark.parametrize("rows", [1, 2])
def test_the_host_reads_once_a_call(quick, reads, rows):
    pipeline, state, pool = filled(rows)
    for _ in range(3):
        steps = layers(pipeline, state, CHUNK)
        next(steps)
        reads.clear()
        next(steps), next(steps)
        assert not reads
        assert not any(steps)
        check_pages(pool, state)
        assert pool.reserved == 0


@pytest.mark.parametrize(
    ("rows", "selection"),
    [(1, None), pytest.param(2, Quest(budget=24), marks=pytest.mark.slow)],
)
def test_promised_or_not_the_cache_is_the_same(quick, monkeypatch, rows, selection):
    found = []
    for promised in (True, False):
        if not promised:
            monkeypatch.setattr(prompt_pages, "_promise", lambda *_: 0)
        pipeline, state, pool = filled(rows, selection)
        for _ in range(2):
            list(layers(pipeline, state, CHUNK))
        list(layers(pipeline, state, 1, "decode"))
        stored = []
        for layer in state.layers:
            width = -(-int(layer.counts.max()) // SIZE)
            slot = torch.arange(width * SIZE, device=DEVICE)
            there = (slot < layer.counts[..., None]).unflatten(2, (-1, SIZE))
            pages = state.ops.read_pages(pool.pages, layer.table[..., :width])
            stored += [layer.counts, *(x[there] for x in pages)]
        found.append(stored)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_promised_is_nobody_elses(quick):
    """Another cache that decodes and prompts between the layers leaves what they will take."""
    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    most = 2 * HEADS * -(-CHUNK // SIZE)  # of two layers to come
    assert pool.reserved == most <= pool.available
    list(layers(pipeline, other, 1, "decode"))
    assert pool.available >= pool.reserved >= most
    list(layers(pipeline, other, CHUNK))
    assert pool.available >= most
    assert len(list(steps)) == LAYERS - 1
    check_pages(pool, state, other)


@pytest.mark.parametrize("fails", [0, 1])
def test_a_call_that_is_aborted_gives_its_promise_back(quick, fails):
    pipeline, state, pool = filled()
    used, steps = pool.used, layers(pipeline, state, CHUNK)
    for _ in range(fails + 1):
        next(steps)
    assert pool.reserved
    pipeline.abort(state)
    assert (pool.reserved, pool.used) == (0, used)
    list(layers(pipeline, state, CHUNK))
    check_pages(pool, state)


def test_memory_that_does_not_suffice_for_all_layers(quick, monkeypatch):
    pipeline, state, pool = filled()
    provide, calls = PagePool.provide, []

    def fails_first(self, count, free=None):
        calls.append(count)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return provide(self, count, free)

    monkeypatch.setattr(PagePool, "provide", fails_first)
    assert len(list(layers(pipeline, state, CHUNK))) == LAYERS
    assert len(calls) > 1 and pool.reserved == 0
    check_pages(pool, state)


def test_a_first_prompt_leaves_little_of_what_it_was_promised(quick, monkeypatch):
    """Where much would stay, memory goes back; where little does, it stays for what follows."""
    spare = {}
    for left in (0, 1 << 30):
        monkeypatch.setattr(prompt_pages, "LEFT", left)
        _, state, pool = filled(sparsity=0.95)
        spare[left] = pool.available
        check_pages(pool, state)
    assert spare[0] < spare[1 << 30] // 2


def test_a_cache_capped_in_tokens_is_promised_nothing(quick):
    pipeline, state, pool = filled(max_tokens=1 << 20)
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    assert pool.reserved == 0
    list(steps)


def test_a_cache_is_promised_what_its_cap_holds(quick):
    """Where all tokens of a call would not fit, the host asks each layer what was admitted."""
    caps, seen = near_a_cap(), set()
    for cap, calls in caps:
        pipeline, state, pool = filled(max_bytes=cap)
        for _ in range(calls):
            list(layers(pipeline, state, CHUNK))
        for _ in layers(pipeline, state, CHUNK):
            seen.add(pool.reserved > 0)
            assert pool.capacity <= pool.limit + 1
        check_pages(pool, state)
    assert seen == {False, True}


def test_pages_that_move_grow_once_a_call(monkeypatch):
    """The reference's, which would otherwise be held twice while each layer's are added."""
    pipeline = CachePipeline(window=3, backend="reference")
    spec = CacheSpec(layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim=16, page_size=SIZE)
    state = pipeline.init(spec)
    made, grow = [], PagePool._grow_moving

    def counting(pool, count):
        made.append(count)
        return grow(pool, count)

    monkeypatch.setattr(PagePool, "_grow_moving", counting)
    for count in (200, 90):
        made.clear()
        pipeline.begin(state, [count], "prompt")
        for layer in range(LAYERS):
            pipeline.attend(state, layer, *(torch.randn(HEADS, count, 16) for _ in range(3)))
        pipeline.commit(state)
        assert len(made) == 1
    pool = state.devices.pools[0]
    assert pool.capacity <= pool.used + 2 * SLAB_PAGES
    assert int(state.layers[0].counts.min()) == 290 - 3
