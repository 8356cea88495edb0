"""Pages for a prompt call: the host asks the device once, and stays right about what is free."""

from __future__ import annotations

import gc

import pytest
import torch

from kvpolicy import CapacityError, PhaseError
from kvpolicy.calls import prompt_pages
from kvpolicy.kernels import prompt_write
from kvpolicy.ops import load
from kvpolicy.selection import Quest
from kvpolicy.store.fork import select_rows
from kvpolicy.store.pool import PagePool
from tests.support.store.room import (
    CHUNK,
    DEVICE,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    check_pages,
    filled,
    layers,
    near_a_cap,
)


@pytest.fixture
def asked(monkeypatch):
    """How often a layer waited for its counts."""
    found, provide_for_write = [], PagePool.provide_for_write

    def spy(pool, count, free):
        found.append(count)
        provide_for_write(pool, count, free)

    monkeypatch.setattr(PagePool, "provide_for_write", spy)
    return found


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch):
    """No call is promised pages for all its layers, which these short ones would be."""
    monkeypatch.setattr(prompt_pages, "_promise", lambda *_: 0)


@pytest.fixture
def quick(monkeypatch):
    """Leaves attention out, which interpreted kernels spend their time on."""
    for name in ("prefill_attention", "paged_decode"):
        monkeypatch.setattr(load("triton"), name, lambda q, *_, **__: q, raising=False)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_host_waits_in_the_first_layer_only(quick, asked, rows):
    pipeline, state, pool = filled(rows)
    for _ in range(12):  # the pool grows in between
        asked.clear()
        for _ in layers(pipeline, state, CHUNK):
            assert pool.known.least <= pool.available
            assert pool.known.settle() == pool.available
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("rows", "selection"),
    [(1, None), pytest.param(2, Quest(budget=24), marks=pytest.mark.slow)],
)
def test_waiting_or_not_the_cache_is_the_same(monkeypatch, asked, rows, selection):
    if rows > 1:
        monkeypatch.setattr(
            load("triton"), "prefill_attention", lambda q, *_, **__: q, raising=False
        )
    found = []
    for waits in (False, True):
        if waits:
            monkeypatch.setattr(prompt_pages, "_ahead", lambda *_: False)
        pipeline, state, pool = filled(rows, selection)
        asked.clear()
        outs = [out for _ in range(2) for out in layers(pipeline, state, CHUNK)]
        assert len(asked) == (2 * LAYERS if waits else 2)
        outs += layers(pipeline, state, 1, "decode")
        for layer in state.layers:
            held = layer.table > 0
            slot = torch.arange(layer.table.shape[2] * SIZE, device=DEVICE)
            stored = (slot < layer.counts[..., None]).unflatten(2, (-1, SIZE))
            assert not stored[~held].any()
            pages = state.ops.read_pages(pool.pages, layer.table[held])
            outs += [layer.counts, *(x[stored[held]] for x in pages)]
            if selection is not None:
                outs.append(state.ops.read_summary(pool.pages, layer.table[held]))
        found.append((outs, pool.used))
    (ours, used), (theirs, wanted) = found
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)
    assert used == wanted


@pytest.mark.parametrize("spare", [0, 1, 7])
def test_promised_pages_stay_free(quick, asked, spare):
    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    list(layers(pipeline, other, 1, "decode"))
    promised = sum(x.reserved for x in other.devices._leases.values())
    assert promised > 0
    pool.take(pool.available - promised - spare)
    asked.clear()
    for _ in range(5):
        for _ in layers(pipeline, state, CHUNK):
            assert pool.available >= promised
    assert len(asked) == 5


def test_a_cache_that_goes_makes_the_next_layer_ask(quick, asked):
    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    list(layers(pipeline, other, 40))
    asked.clear()
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    next(steps)
    del other
    gc.collect()
    next(steps)
    assert len(asked) == 2
    assert pool.known.settle() == pool.available
    list(steps)
    assert len(asked) == 2


def test_a_cache_that_goes_while_a_layer_counts(quick, asked, monkeypatch):
    """Its promise goes with it, but not the pages that it took of those promised."""
    pipeline, state, pool = filled()
    others = [select_rows(state, [0])]
    list(layers(pipeline, others[0], 1, "decode"))
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    for _ in range(2 * SIZE):
        list(layers(pipeline, others[0], 1, "decode"))
    count_leaving = load("triton").count_leaving

    def count_and_collect(*args):
        others.clear()
        gc.collect()
        return count_leaving(*args)

    monkeypatch.setattr(load("triton"), "count_leaving", count_and_collect)
    for _ in steps:
        assert pool.known.settle() == pool.available


def test_a_cache_that_is_promised_pages_anew(quick):
    """What it took of those promised before is no longer covered."""
    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    list(layers(pipeline, other, 1, "decode"))
    steps = layers(pipeline, state, 38)
    next(steps)
    for _ in range(200):
        before = other.steps_reserved
        list(layers(pipeline, other, 1, "decode"))
        spare = pool.available - pool.reserved
        if other.steps_reserved > before and spare < 20:
            break
    for _ in steps:
        assert pool.known.settle() == pool.available
    for _ in range(other.steps_reserved):
        list(layers(pipeline, other, 1, "decode"))
    check_pages(pool, state, other)


def test_a_cache_that_goes_while_the_pool_grows(quick, asked, monkeypatch):
    pipeline, state, pool = filled(sparsity=0.05)
    others = [select_rows(state, [0])]
    list(layers(pipeline, others[0], 1, "decode"))
    pool.take(pool.available - pool.reserved - 38)
    steps = layers(pipeline, state, 38)
    next(steps)
    for _ in range(14):
        list(layers(pipeline, others[0], 1, "decode"))
    provide, seen = PagePool.provide, []

    def collected(self, count, free=None):
        seen.append(count)
        others.clear()
        gc.collect()
        return provide(self, count, free)

    monkeypatch.setattr(PagePool, "provide", collected)
    next(steps)
    assert seen
    assert pool.known.settle() <= pool.available
    check_pages(pool, state)


def test_a_write_that_is_broken_off(quick, monkeypatch):
    """Between storing tokens and settling counts; what it took is free again and held by nobody."""

    class Broken:
        def __getitem__(self, grid):
            raise KeyboardInterrupt

    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    refs = pool.refs.clone()
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_write, "_settle", Broken())
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    pipeline.abort(state)
    assert torch.equal(pool.refs[: len(refs)], refs)
    list(layers(pipeline, other, CHUNK))
    check_pages(pool, state, other)
    state.reset()
    check_pages(pool, other)


def test_a_layer_that_failed_is_not_run_again(quick, monkeypatch):
    pipeline, state, _ = filled()
    steps = layers(pipeline, state, CHUNK)
    next(steps)

    def fails(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(load("triton"), "prefill_attention", fails)
        with pytest.raises(torch.OutOfMemoryError):
            next(steps)
    tokens = [torch.randn(HEADS, CHUNK, DIM, device=DEVICE) for _ in range(3)]
    with pytest.raises(PhaseError, match="layer 1 failed in this call"):
        pipeline.attend(state, 1, *tokens)
    pipeline.abort(state)
    list(layers(pipeline, state, CHUNK))


def test_pages_that_were_not_there_are_an_error(quick):
    """Not a loss that nobody sees."""
    pipeline, state, pool = filled()
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    pool.take(pool.available)
    pool.known.learn(1000)
    next(steps)
    with pytest.raises(RuntimeError, match="pages where 0 were free"):
        next(steps)


def test_a_cache_that_gives_up_its_promise(quick):
    """What it took of the pages promised to it is no longer covered."""
    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    list(layers(pipeline, other, 1, "decode"))
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    for _ in range(2 * SIZE):
        list(layers(pipeline, other, 1, "decode"))
    pipeline.begin(other, [1], "prompt")
    for _ in steps:
        assert pool.known.settle() == pool.available


def test_nothing_is_known_between_calls(quick):
    pipeline, state, pool = filled()
    assert pool.known.least is None
    next(layers(pipeline, state, CHUNK))
    assert pool.known.least is not None
    pipeline.abort(state)
    assert pool.known.least is None


def test_another_caches_prompt_in_between(quick, asked):
    pipeline, state, pool = filled()
    other = select_rows(state, [0])
    ours, theirs = layers(pipeline, state, CHUNK), layers(pipeline, other, CHUNK)
    for _ in range(LAYERS):
        next(ours)
        next(theirs)
        assert pool.known.settle() == pool.available
    assert not any(ours) and not any(theirs)
    del other
    gc.collect()
    pool.drain()
    own = sum(int((-(-layer.counts // SIZE)).sum()) for layer in state.layers)
    assert pool.used == own


def test_memory_that_suffices_for_what_is_admitted_alone(quick, asked, monkeypatch):
    pipeline, state, pool = filled()
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    pool.known.learn(0)  # as if the bound would not fit
    provide, calls = PagePool.provide, []

    def fails_first(self, count, free=None):
        calls.append(count)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return provide(self, count, free)

    monkeypatch.setattr(PagePool, "provide", fails_first)
    next(steps)
    assert len(asked) >= 2 and calls[1] <= calls[0]
    assert pool.known.least == pool.available
    list(steps)


def test_a_cap_in_tokens_is_checked_with_what_was_admitted(quick, asked):
    pipeline, state, pool = filled(max_tokens=1 << 20)
    asked.clear()
    list(layers(pipeline, state, CHUNK))
    assert len(asked) == LAYERS


def test_a_cap_in_bytes_is_checked_with_what_was_admitted(quick, asked):
    """In each layer that could go beyond it; a call that all of fits waits once."""
    for (cap, calls), waits in zip(near_a_cap(), (False, True), strict=True):
        pipeline, state, pool = filled(max_bytes=cap)
        for _ in range(calls):
            list(layers(pipeline, state, CHUNK))
        asked.clear()
        list(layers(pipeline, state, CHUNK))
        assert (len(asked) > 1) == waits
    with pytest.raises(CapacityError):
        for _ in range(LAYERS):
            list(layers(pipeline, state, CHUNK))


def test_a_chunk_that_is_long_beside_the_cache_waits(quick, asked):
    pipeline, state, _ = filled()
    asked.clear()
    list(layers(pipeline, state, 200))
    assert len(asked) == LAYERS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_device_is_not_waited_for():
    pipeline, state, _ = filled(selection=Quest(budget=24))
    list(layers(pipeline, state, CHUNK))  # kernels compile
    steps = layers(pipeline, state, CHUNK)
    next(steps)
    before = torch.cuda.get_sync_debug_mode()
    tokens = [torch.randn(HEADS, CHUNK, DIM, device=DEVICE) for _ in range(3)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for layer in range(1, LAYERS):
            pipeline.attend(state, layer, *tokens)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    pipeline.commit(state)
