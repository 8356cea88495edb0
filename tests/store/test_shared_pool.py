"""Caches that share a pool: caps, forks and what they were promised."""

from __future__ import annotations

import gc

import pytest
import torch

from kvpolicy import CacheSpec, CapacityError, RandomGate
from kvpolicy.pipeline import CachePipeline
from kvpolicy.store.fork import select_rows

SIZE = 4


def state_of(rows, steps, **sizes):
    """A cache of random tokens, with the calls that fill it."""
    spec = CacheSpec(layers=2, heads=2, kv_heads=2, head_dim=16, page_size=SIZE, **sizes)
    pipeline = CachePipeline(admission=RandomGate(sparsity=0.2), window=3)
    state = pipeline.init(spec, rows)
    call(pipeline, state, "prompt", steps)
    return pipeline, state


def call(pipeline, state, phase, count):
    pipeline.begin(state, [count] * state.batch, phase)
    shape = (2, count * state.batch, 16) if phase == "prompt" else (state.batch, 2, count, 16)
    for layer in range(2):
        pipeline.attend(state, layer, *(torch.randn(shape) for _ in range(3)))
    pipeline.commit(state)


def test_a_cap_stops_calls_before_anything_is_stored():
    pipeline, state = state_of(2, 40)
    pool = state.devices.pools[0]
    pool.limit = pool.used + 4
    kept = [state.kept(1, row, 0).tolist() for row in range(2)]
    used = pool.used
    with pytest.raises(CapacityError):
        for _ in range(3 * SIZE * 2):
            call(pipeline, state, "decode", 1)
            kept, used = [state.kept(1, row, 0).tolist() for row in range(2)], pool.used
    assert state.call is None
    with pytest.raises(CapacityError):
        call(pipeline, state, "prompt", 60)
    pipeline.abort(state)
    assert [state.kept(1, row, 0).tolist() for row in range(2)] == kept
    assert pool.used == used == pool.limit  # to the last page
    pool.limit += 4
    call(pipeline, state, "prompt", 1)


def test_forks_share_full_pages_and_give_them_back():
    pipeline, state = state_of(2, 40)
    pool = state.devices.pools[0]
    used = pool.used
    full = sum(int((layer.counts // SIZE).sum()) for layer in state.layers)
    fork = select_rows(state, [0, 1])
    assert int((pool.refs > 1).sum()) == full
    assert pool.used == 2 * used - full
    assert pipeline.report(state).shared_pages == full
    del fork
    assert pool.used == used
    assert int((pool.refs > 1).sum()) == 0


def test_forks_in_reference_cycles_give_pages_back():
    pipeline, state = state_of(1, 40)
    pool = state.devices.pools[0]
    used = pool.used
    fork = select_rows(state, [0])
    call(pipeline, fork, "prompt", 20)
    fork.cycle = fork
    del fork
    gc.collect()
    assert pool.used == used
    held = sum(int((layer.table > 0).sum()) for layer in state.layers)
    assert pool.used == held


def test_promises_of_forks_do_not_overlap():
    """What one fork was promised for decoding is not given to another."""
    pipeline, state = state_of(1, 40, interval=8)
    forks = [state, *(select_rows(state, [0]) for _ in range(3))]
    pool = state.devices.pools[0]
    for fork in forks:
        call(pipeline, fork, "decode", 1)
    pool.limit = pool.capacity - 1
    for _ in range(7):
        for fork in forks:
            call(pipeline, fork, "decode", 1)
    kept = [[fork.kept(0, 0, h).tolist() for h in range(2)] for fork in forks]
    assert kept == [kept[0]] * 4
