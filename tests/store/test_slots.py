"""Slots one by one: what is refused, what it costs, what pages are counted."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    H2O,
    CachePipeline,
    CacheSpec,
    CapacityError,
    PhaseError,
    Quest,
    RandomGate,
    XAttention,
)
from kvpolicy.store import (
    clear,
    free_pages,
    held_pages,
    move,
    park,
    prompt_pages,
    side_state,
    step_pages,
    unpark,
)
from kvpolicy.store.fork import select_rows

SIZE, WINDOW = 4, 3
SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=16, page_size=SIZE, rollback=2, interval=4)
PIPELINE = CachePipeline(window=WINDOW, backend="reference")
GATED = CachePipeline(
    admission=RandomGate(sparsity=0.4), selection=Quest(budget=12), eviction=H2O(budget=24),
    window=WINDOW, backend="reference",
)  # fmt: skip


def call(pipeline, state, counts, phase):
    pipeline.begin(state, counts, phase)
    attend(pipeline, state, counts, phase)
    pipeline.commit(state)


def attend(pipeline, state, counts, phase):
    prompt, device = phase == "prompt", state.spec.device
    shape = (sum(counts),) if prompt else (len(counts), 1)
    for layer in range(state.spec.layers):
        q, k, v = (
            torch.randn(h, shape[0], 16) if prompt else torch.randn(shape[0], h, 1, 16)
            for h in (4, 2, 2)
        )
        pipeline.attend(state, layer, q.to(device), k.to(device), v.to(device))


def room(pipeline, lengths, spec=SPEC):
    """A cache with a slot for each of `lengths`, 0 for a free one, and an empty one beside it."""
    state = pipeline.init(spec, len(lengths))
    state.finish(range(len(lengths)))
    side = side_state(state, 1)
    for slot, length in enumerate(lengths):
        if length:
            call(pipeline, side, [length], "prompt")
            pipeline.end_prompt(side)
            move(state, slot, side, 0)
    return state, side


def everything(state):
    """All that a cache and its pools hold, for comparing before and after."""
    tensors = [t for x in state.layers for t in (x.table, *x.buffers.values())]
    tensors += [t for p in state.devices.pools for t in (p.refs, p.top, p.free[: p.available])]
    hosts = [attrs.astuple(x) for x in state.sequences]
    return [t.tolist() for t in tensors], hosts, state.devices.read(), state.steps_reserved


REFUSED = [
    (lambda room, side: move(room, 0, side, 0), ValueError, "slot: wanted an empty .* 30 tokens"),
    (lambda room, side: move(room, 0, room, 0), ValueError, "slot: wanted another sequence"),
    (lambda room, side: move(room, 3, side, 0), ValueError, "slot: .* from 0 below 3, got 3"),
    (lambda room, side: move(room, 1, side, 1), ValueError, "row: .* from 0 below 1, got 1"),
    (lambda room, side: move(room, -1, side, 0), ValueError, "slot: wanted at least 0, got -1"),
    (lambda room, side: move(room, "1", side, 0), TypeError, "slot: wanted an int"),
    (lambda room, side: move(room, 1, None, 0), TypeError, "source: wanted a CacheState"),
    (
        lambda room, side: move(room, 1, PIPELINE.init(SPEC), 0),
        ValueError,
        "source: wanted a cache on the pages of target",
    ),
    (lambda room, side: clear(room, [0, 3]), ValueError, "rows: .* from 0 below 3, got 3"),
    (lambda room, side: clear(room, ["a"]), TypeError, "rows: wanted a list of numbers"),
    (lambda room, side: park(room, 5), ValueError, "row: .* got 5"),
    (lambda room, side: unpark(room, 1, "x"), TypeError, "parked: wanted a sequence that park"),
    (lambda room, side: side_state(room, 0), ValueError, "batch: wanted at least 1, got 0"),
    (lambda room, side: room.resume([7]), ValueError, "rows: .* got 7"),
    (lambda room, side: step_pages(room, -1), ValueError, "steps: wanted at least 0"),
    (lambda room, side: prompt_pages(room, [1]), ValueError, "added: wanted 3 numbers from 0"),
]


@pytest.mark.parametrize(("work", "error", "message"), REFUSED)
def test_what_makes_no_sense_changes_nothing(work, error, message):
    state, side = room(PIPELINE, [30, 0, 20])
    call(PIPELINE, side, [9], "prompt")
    before = everything(state), everything(side)
    with pytest.raises(error, match=message):
        work(state, side)
    assert (everything(state), everything(side)) == before


@pytest.mark.parametrize("open_in", ["room", "side"])
def test_a_call_in_flight_keeps_its_sequences(open_in):
    state, side = room(PIPELINE, [30, 0])
    opened = {"room": state, "side": side}[open_in]
    works = [lambda: move(state, 1, side, 0)]
    works += [lambda: park(opened, 0), lambda: clear(opened, [0]), lambda: side_state(opened)]
    parked = park(select_rows(state, [0]), 0)
    works.append(lambda: unpark(opened, 0, parked))
    PIPELINE.begin(opened, [1] * opened.batch, "prompt")
    for work in works:
        with pytest.raises(PhaseError, match="a call is in flight"):
            work()
    PIPELINE.abort(opened)


def test_a_parked_sequence_knows_its_cache():
    state, _ = room(PIPELINE, [30])
    parked = park(state, 0)
    with pytest.raises(ValueError, match="parked: wanted a sequence of a cache on the same pages"):
        unpark(PIPELINE.init(SPEC), 0, parked)
    unpark(state, 0, parked)
    with pytest.raises(ValueError, match="slot: wanted an empty sequence, 0 holds 30 tokens"):
        unpark(state, 0, parked)


def test_parked_bytes_are_those_of_its_pages_and_rings():
    state, _ = room(PIPELINE, [30, 0])
    parked = park(state, 0)
    pages = 2 * 2 * -(-(30 - WINDOW) // SIZE)
    ring = 2 * 2 * (WINDOW + SPEC.rollback) * (2 * 16 * 4 + 1)
    assert parked.pages == (pages,)
    assert parked.nbytes == pages * SIZE * (2 * 16 * 4 + 4) + ring + 2 * 2 * (4 + 8)
    assert state.devices.pools[0].used == 0


def test_pages_are_counted():
    """Of every token, by hand: free, held, and needed by steps and by a prompt."""
    limited = attrs.evolve(SPEC, max_bytes=128 * SIZE * (2 * 16 * 4 + 4))
    state, side = room(PIPELINE, [30, 0, 21, 12], limited)
    (pool,) = state.devices.pools
    held = [28, 0, 20, 12]  # of 27, 0, 18 and 9 global tokens in 4 heads
    assert held_pages(state) == {pool: held}
    # Two of the pool's 64-page slabs, without the null page.
    assert free_pages(state) == free_pages(side) == {pool: 127 - sum(held)}
    assert step_pages(state, 1) == {pool: 0}
    assert [step_pages(state, n)[pool] for n in (2, 3, 4)] == [4, 4 + 4, 4 + 4 + 4]
    state.finish([2])
    assert step_pages(state, 4) == {pool: 4 + 4}
    assert prompt_pages(side, [3]) == {pool: 0}
    assert prompt_pages(side, [24]) == {pool: 4 * 6}
    PIPELINE.reserve(state, 4)
    assert free_pages(state)[pool] == free_pages(side)[pool] + 8
    call(PIPELINE, side, [24], "prompt")
    assert held_pages(side) == {pool: [24]}


def test_no_free_pages_no_sequence():
    limited = attrs.evolve(SPEC, max_bytes=64 * SIZE * (2 * 16 * 4 + 4))
    state, side = room(PIPELINE, [40, 0], limited)
    parked = park(state, 0)
    call(PIPELINE, side, [60], "prompt")
    before = everything(state)
    with pytest.raises(CapacityError):
        unpark(state, 1, parked)
    assert everything(state) == before
    clear(side, [0])
    unpark(state, 1, parked)
    assert state.lengths == [0, 40] and held_pages(state)[state.devices.pools[0]] == [0, 40]


def test_free_slots_reserve_nothing():
    """A step at the last page goes on although most of the room is empty."""
    limited = attrs.evolve(SPEC, max_bytes=64 * SIZE * (2 * 16 * 4 + 4), interval=1)
    state, _ = room(PIPELINE, [0, 59, 0, 0, 0], limited)
    assert free_pages(state) == {state.devices.pools[0]: 7}
    for _ in range(4):
        call(PIPELINE, state, [1] * 5, "decode")
    assert state.lengths == [0, 63, 0, 0, 0]


def test_forks_keep_their_pages():
    state, side = room(GATED, [40, 0])
    fork = select_rows(state, [0])
    kept = [fork.kept(n, 0, h).tolist() for n in range(2) for h in range(2)]
    free = state.devices.pools[0].available
    parked = park(state, 0)
    assert [fork.kept(n, 0, h).tolist() for n in range(2) for h in range(2)] == kept
    assert state.devices.pools[0].available < free + parked.pages[0]
    assert GATED.report(fork).shared_pages == 0
    unpark(state, 1, parked)
    assert [state.kept(n, 1, h).tolist() for n in range(2) for h in range(2)] == kept


def test_reports_with_empty_slots():
    """Pages in use are those of the sequences there are; a mean counts empty ones as nothing."""
    state, _ = room(GATED, [40, 30])
    full = GATED.report(state)
    call(GATED, state, [1, 1], "decode")
    clear(state, [1])
    half = GATED.report(state)
    assert half.tokens == 41 and half.sequences == 2
    (used, none), *_ = held_pages(state).values()
    assert (half.pages, half.positions) == (used * SIZE * 2 * 16 * 4, used * SIZE * 4) and not none
    assert half.pages + half.reserved + half.positions + half.summaries == (
        full.pages + full.reserved + full.positions + full.summaries
    )
    alone = GATED.report(select_rows(state, [0]))
    assert half.evicted == alone.evicted and half.admitted == alone.admitted
    assert half.stored == [[n / 2 for n in layer] for layer in alone.stored]
    for read, stored in zip(half.read, half.stored, strict=True):
        assert all(0 < n < max(stored) for n in read)
    clear(state, [0])
    none = GATED.report(state)
    assert none.pages == none.tokens == 0 and none.read == [[0.0] * 2] * 2


def test_what_has_not_decoded_here_read_its_window():
    state, side = room(GATED, [40, 0])
    call(GATED, state, [1, 1], "decode")
    before = GATED.report(state).read
    call(GATED, side, [30], "prompt")
    GATED.end_prompt(side)
    move(state, 1, side, 0)
    wanted = [[n + WINDOW / 2 for n in layer] for layer in before]
    assert GATED.report(state).read == wanted


def test_tiles_read_are_counted_where_the_sequence_is():
    pipeline = CachePipeline(selection=XAttention(threshold=0.5, stride=2, tile=4), window=WINDOW)
    state, side = room(pipeline, [40, 0])
    read = pipeline.report(state).prompt_read
    assert all(0 < x < 1 for x in read)
    assert pipeline.report(side).prompt_read == [None, None]
    call(pipeline, side, [40], "prompt")
    other = pipeline.report(side).prompt_read
    move(state, 1, side, 0)
    assert pipeline.report(state).prompt_read == pytest.approx(
        [(a + b) / 2 for a, b in zip(read, other, strict=True)]
    )


def behind():
    """A room after steps of a graph: the host does not know that the second sequence ended."""
    state, side = room(PIPELINE, [30, 20, 0])
    PIPELINE.reserve(state, 8)
    for on in ([True, True, False], [True, False, False]):
        PIPELINE.activate(state, torch.tensor(on))
        with state.rehearsal():
            call(PIPELINE, state, [1, 1, 1], "decode")
        PIPELINE.replayed(state)
    return state, side


AFTER = [
    (lambda room, side: move(room, 2, side, 0), [32, 21, 10], [True, False, True]),
    (lambda room, side: move(room, 2, room, 1), [32, 0, 21], [True, False, False]),
    (lambda room, side: move(side_state(room), 0, room, 0), [0, 21, 0], [False] * 3),
    (lambda room, side: clear(room, [0]), [0, 21, 0], [False] * 3),
    (lambda room, side: park(room, 0), [0, 21, 0], [False] * 3),
    (lambda room, side: unpark(room, 2, park(room, 1)), [32, 0, 21], [True, False, False]),
    (lambda room, side: room.finish([0]), [32, 21, 0], [False] * 3),
    (lambda room, side: room.resume([1]), [32, 21, 0], [True, True, False]),
]


@pytest.mark.parametrize(("work", "lengths", "active"), AFTER)
def test_the_device_knows_which_sequences_ended(work, lengths, active):
    """What the host writes does not undo what happened there."""
    state, side = behind()
    call(PIPELINE, side, [10], "prompt")
    work(state, side)
    assert state.lengths == state.devices.read()[0] == lengths
    assert state.active == state.devices.read()[1] == active


def test_a_new_sequence_reserves_its_pages():
    """Steps that were reserved before it came do not write where no page is free."""
    limited = attrs.evolve(SPEC, max_bytes=64 * SIZE * (2 * 16 * 4 + 4), interval=1)
    state, side = room(PIPELINE, [40, 0], limited)
    call(PIPELINE, side, [21], "prompt")
    PIPELINE.reserve(state, 3)
    move(state, 1, side, 0)
    for _ in range(2):
        call(PIPELINE, state, [1, 1], "decode")
    with pytest.raises(CapacityError, match="4 more pages wanted, 3 free"):
        call(PIPELINE, state, [1, 1], "decode")
    assert state.lengths == [42, 23]
    state.finish([1])
    call(PIPELINE, state, [1, 1], "decode")


def test_sequences_beside_a_replay_stay():
    from kvpolicy import KVzip

    pipeline = CachePipeline(eviction=KVzip(budget=20), window=WINDOW)
    state = pipeline.init(SPEC, 2)
    call(pipeline, state, [30, 0], "prompt")
    with pipeline.replay(state) as fork, pytest.raises(PhaseError, match="the fork of a replay"):
        move(fork, 1, fork, 0)
