"""Work that is broken off at any line leaves every page in a table or free, and the cache whole."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy import CachePipeline, CacheSpec, Quest, RandomGate, SnapKV
from kvpolicy.store.fork import adopt, select_rows
from kvpolicy.store.rollback import crop

HOME = str(Path(kvpolicy.__file__).parent)
ROOMS = tuple(f"{HOME}/{room}/" for room in ("store", "calls", "reference"))
# What mends, and what Python does not let fail.
UNTRACED = {"unbroken", "recount", "tables", "abandon", "__del__"}
SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=4, page_size=2, rollback=4, interval=4)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.4),
    selection=Quest(budget=12),
    eviction=SnapKV(budget=14, observation=2, when="decode"),
    window=3,
    backend="reference",
)


class Stop(KeyboardInterrupt):
    pass


class BreakAt:
    """Raises at the `nth` line of the store, the calls or the reference that runs inside."""

    def __init__(self, nth):
        self.left = nth

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        code = frame.f_code
        mends = UNTRACED.intersection(code.co_qualname.split("."))
        if mends or not code.co_filename.startswith(ROOMS):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Stop
        return self.trace


def attend(state, counts, phase):
    PIPELINE.begin(state, counts, phase)
    packed = (sum(counts),) if phase == "prompt" else (len(counts), 1)
    for layer in range(SPEC.layers):
        q, k, v = (
            torch.randn(h, packed[0], 4) if phase == "prompt" else torch.randn(packed[0], h, 1, 4)
            for h in (4, 2, 2)
        )
        PIPELINE.attend(state, layer, q, k, v)


def call(state, counts, phase):
    attend(state, counts, phase)
    PIPELINE.commit(state)


def filled():
    state = PIPELINE.init(SPEC, 2)
    call(state, [21, 18], "prompt")
    PIPELINE.end_prompt(state)
    return state


def check_pages(*states):
    """Each page is free or held, as often as tables name it; tables name the counted pages."""
    (pool,) = {pool for state in states for pool in state.devices.pools}
    free = pool.free[: pool.available].tolist()
    named = Counter()
    for state in states:
        for layer in state.layers:
            named.update(layer.table[layer.table > 0].tolist())
    assert {page: n for page, n in enumerate(pool.refs.tolist()) if n} == named
    assert sorted([*free, *named]) == list(range(1, pool.capacity))


def held(state):
    heads = range(SPEC.kv_heads)
    return state.lengths, [
        state.kept(layer, row, head).tolist()
        for layer in range(SPEC.layers) for row in range(state.batch) for head in heads
    ]  # fmt: skip


def prompt(state):
    attend(state, [9, 12], "prompt")


def decode(state):
    attend(state, [1, 1], "decode")


def fork(state):
    return select_rows(state, [1, 0, 1])


def take_back(state):
    crop(state, [2, 0])


def swap(state):
    adopt(state, select_rows(state, [1, 0]))


def evict(state):
    PIPELINE.maintain(state)


# Whether the cache is as before; what moves tokens in place cannot promise that.
WORK = {prompt: True, decode: True, fork: True, take_back: False, swap: False, evict: False}


def prepared(work):
    torch.manual_seed(1)
    state = filled()
    if work is evict:
        for row in state.sequences:
            row.considered_at = 0
        call(state, [8, 8], "prompt")
        for row in state.sequences:
            row.prompt_open = False
        return state, select_rows(state, [0])
    for _ in range(2):
        call(state, [1, 1], "decode")
    return state, select_rows(state, [0])


def broken_off(work, nth):
    """Whether `work` ran to its end before the `nth` line."""
    state, other = prepared(work)
    before = held(state), held(other)
    try:
        with BreakAt(nth) as tracer:
            work(state)
    except Stop:
        pass
    finally:
        sys.settrace(None)
    PIPELINE.abort(state)
    check_pages(state, other)
    if tracer.left > 0:
        return True
    assert held(other) == before[1]
    if WORK[work]:
        assert held(state) == before[0]
        call(state, [1, 1], "decode")
        check_pages(state, other)
    return False


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_no_page_is_lost(work, step):
    nth, tried = 1, 0
    while not broken_off(work, nth):
        nth, tried = nth + step, tried + 1
    assert tried > 3
