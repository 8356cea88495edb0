"""Work that is broken off at any line leaves every page in a table or free, and the cache whole."""

from __future__ import annotations

import sys

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, Quest, RandomGate, SnapKV
from kvpolicy.store import clear, move, park, side_state, unpark
from kvpolicy.store.fork import adopt, select_rows
from kvpolicy.store.rollback import crop
from tests.support.contract.breaking import BreakAt, Stop, check_pages

SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=4, page_size=2, rollback=4, interval=4)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.4),
    selection=Quest(budget=12),
    eviction=SnapKV(budget=14, observation=2, when="decode"),
    window=3,
    backend="reference",
)


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


def two():
    """A room with a free slot between two sequences, one waiting outside, and one beside it."""
    torch.manual_seed(1)
    state = select_rows(filled(), [0, -1, 1])
    clear(state, [1])
    waiting = select_rows(state, [2])
    parked = park(waiting, 0)
    side = side_state(state, 2)
    call(side, [19, 3], "prompt")
    PIPELINE.end_prompt(side)
    return state, side, parked


def sequences(*states):
    """What each sequence holds, in any order; empty ones left out."""
    heads, found = range(SPEC.kv_heads), []
    for state in states:
        assert [*state.devices.read()] == [state.lengths, state.active]
        for row, length in enumerate(state.lengths):
            kept = [state.kept(n, row, h).tolist() for n in range(SPEC.layers) for h in heads]
            assert length or not any(kept)
            found += [(length, kept)] if length else []
    return sorted(found)


SLOTS = {
    "enter": lambda room, side, parked: move(room, 1, side, 0),
    "move": lambda room, side, parked: move(room, 1, room, 2),
    "park": lambda room, side, parked: park(room, 2),
    "unpark": lambda room, side, parked: unpark(room, 1, parked),
    "cancel": lambda room, side, parked: clear(room, [2]),
}


@pytest.mark.parametrize("work", SLOTS)
@pytest.mark.parametrize("step", [37, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sequence_is_in_one_slot(work, step):
    """Whatever is broken off: where it was or where it went, whole; a parked one is not lost."""
    nth, left = 1, 0
    while left <= 0:
        room, side, parked = two()
        before, staying = sequences(room, side), sequences(select_rows(room, [0]))
        coming = sequences(select_rows(room, [2]))
        try:
            with BreakAt(nth) as tracer:
                SLOTS[work](room, side, parked)
        except Stop:
            pass
        finally:
            sys.settrace(None)
        check_pages(room, side)
        left, nth, after = tracer.left, nth + step, sequences(room, side)
        assert sequences(select_rows(room, [0])) == staying
        if left > 0:
            break
        if work == "unpark":
            assert after in (before, sorted([*before, *coming]))
        elif work == "cancel":
            assert after in (before, [x for x in before if x != coming[0]])
        else:
            assert after == before
        if room.active[0]:
            call(room, [1, 1, 1], "decode")
            check_pages(room, side)
    assert nth > 2 * step
