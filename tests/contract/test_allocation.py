"""Memory that runs out: whichever allocation fails, the cache is as it was and goes on."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from kvpolicy import CacheSpec, CapacityError
from kvpolicy.store import pool as pools
from kvpolicy.store.fork import adopt, select_rows
from kvpolicy.store.pool import PagePool
from kvpolicy.store.rollback import crop
from tests.support.contract.cases import Sizes, build
from tests.support.contract.contents import digest
from tests.support.contract.driver import Run, stream
from tests.support.contract.invariants import check_states
from tests.support.contract.told import before

SPEC = CacheSpec(
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    page_size=2,
    rollback=9,
    interval=4,
    dtype=torch.float64,
    sliding=(None, 3, None),
)
TRIPLES = [
    ("all", "quest", "none"),
    ("gate", "user", "tokens_decode"),
    ("random", "all", "at_end"),
    ("any_of", "quest_first", "adaptive"),
    ("ada_ea", "all", "expected_decode"),
]


class Memory:
    """Memory that runs out: after `count` pages, or `count` allocations on the device."""

    def __init__(self, monkeypatch, kind):
        self.patch, self.kind, self.left = monkeypatch, kind, None
        for owner, name in ((PagePool, "_extent"), (PagePool, "_longer"), (pools, "widened")):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, function):
        def call(*args):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise torch.OutOfMemoryError("no memory")
            return function(*args)

        return call

    @contextlib.contextmanager
    def only(self, state, count):
        pool = state.devices.pools[0]
        if self.kind == "device":
            self.left = count
            yield
            self.left = None
            return
        stack = pool.free[: pool.available].tolist()
        with self.patch.context() as patch:
            if len(stack) > count:
                patch.setattr(pool, "limit", pool.used)
                patch.setattr(pool, "_most", lambda: 0)
                pool.free[:count] = pool.free[len(stack) - count : len(stack)].clone()
                pool.top.fill_(count)
            yield
        if len(stack) > count:  # all that are free then, in their old order
            refs = pool.refs[: pool.capacity].tolist()
            order = dict.fromkeys([*stack, *range(1, pool.capacity)])
            free = [page for page in order if page < pool.capacity and not refs[page]]
            pool.free[: len(free)] = torch.tensor(free, dtype=torch.int32)
            pool.top.fill_(len(free))


@pytest.fixture(params=["pages", "device"])
def memory(request, monkeypatch):
    return Memory(monkeypatch, request.param)


def run_of(names, rows, extra=40):
    sizes = Sizes(SPEC, window=4)
    lengths = [sizes.length + 3 * row for row in range(rows)]
    run = Run(build(sizes, *names), SPEC, [stream(SPEC, n + extra, n) for n in lengths])
    return run, lengths


def until_it_works(run, memory, act, undo=lambda: None, others=()):
    """Tries `act` with 0, 1, 2, ... allocations; returns how often it failed.

    From 9 on in steps of 9.
    """
    for tried in itertools.count():
        before, failed = digest(run.state), False
        with memory.only(run.state, tried if tried < 9 else 9 * (tried - 8)):
            try:
                result = act()
            except (CapacityError, torch.OutOfMemoryError):
                failed = True
        if not failed:
            return tried, result
        undo()
        assert digest(run.state) == before
        check_states(run.pipeline, [run.state, *others])


@pytest.mark.parametrize("names", TRIPLES, ids="-".join)
def test_prompt_end_and_decode(names, memory):
    """Every call that a cache serves, started from a pool that must grow."""
    run, lengths = run_of(names, rows=2)
    pipeline, state = run.pipeline, run.state
    tried = 0
    for cut in ([lengths[0], 5], [0, lengths[1] - 5]):
        spans = list(zip(run.streams, run.at, cut, strict=True))

        def prompt(cut=cut, spans=spans):
            pipeline.begin(state, cut, "prompt")
            for layer in range(SPEC.layers):
                parts = [tuple(x[:, at : at + n] for x in s[layer]) for s, at, n in spans]
                q, k, v, pre = (torch.cat(x, 1) for x in zip(*parts, strict=True))
                pipeline.attend(state, layer, q, k, v, key_pre=pre, query_pre=before(q))
            pipeline.abort(state)

        tried += until_it_works(run, memory, prompt, lambda: pipeline.abort(state))[0]
        run.prompt(cut)
    tried += until_it_works(run, memory, lambda: pipeline.end_prompt(state))[0]
    run.end_prompt()
    run.check()
    for _ in range(2 * SPEC.interval):
        state.steps_reserved = 0
        tried += until_it_works(run, memory, lambda: begin_and_abort(pipeline, state))[0]
        run.decode()
    run.check()
    assert tried > (10 if memory.kind == "pages" else 2)


def begin_and_abort(pipeline, state):
    pipeline.begin(state, [1] * state.batch, "decode")
    pipeline.abort(state)


@pytest.mark.parametrize("names", TRIPLES, ids="-".join)
def test_forks(names, memory):
    """Copies, crops into shared pages, and evictions of shared pages take memory."""
    run, lengths = run_of(names, rows=2)
    run.prompt(lengths)
    run.end_prompt()
    for _ in range(3):
        run.decode()
    while run.state.layers[0].counts[0, 0] % 2:
        run.decode()
    tried, fork = until_it_works(run, memory, lambda: select_rows(run.state, [0, 1]))
    assert tried or memory.kind == "device"
    twin = run.copy(fork)
    twin.streams = [stream(SPEC, n + 40, 7 * n) for n in lengths]
    for row, at in enumerate(run.at):
        for layer in range(SPEC.layers):
            pairs = zip(run.streams[row][layer], twin.streams[row][layer], strict=True)
            twin.streams[row][layer] = tuple(torch.cat([a[:, :at], b[:, at:]], 1) for a, b in pairs)
    drop = [min(3, at - floor) for at, floor in zip(run.at, run.floor, strict=True)]
    before = digest(fork)
    tried = until_it_works(run, memory, lambda: crop(run.state, drop), others=[fork])[0]
    assert tried or names[2] != "none" or memory.kind == "device"
    assert digest(fork) == before
    run.at = [at - n for at, n in zip(run.at, drop, strict=True)]
    for row, n in enumerate(drop):
        run.checked[row] = min(run.checked[row], run.at[row])
        for oracle in run.oracles[row]:
            oracle.crop(n)
    for _ in range(2 * SPEC.interval):
        run.decode()
        twin.decode()
    run.check()
    twin.check()
    adopt(run.state, select_rows(run.state, [0, 1]))
    check_states(run.pipeline, [run.state, twin.state])


def test_an_eviction_of_shared_pages_may_fail(monkeypatch):
    """A due eviction that memory stops stays due, and acts before the next token."""
    memory = Memory(monkeypatch, "pages")
    run, lengths = run_of(("all", "quest", "tokens_decode"), rows=1)
    run.prompt(lengths)
    run.end_prompt()
    while (run.at[0] + 1) % SPEC.interval:
        run.decode()
    fork = select_rows(run.state, [0])
    spare = select_rows(run.state, [0])  # its pages keep the commit below from finding any
    kept = digest(fork)
    pipeline, state = run.pipeline, run.state
    pipeline.begin(state, [1], "decode")
    for layer in range(SPEC.layers):
        columns = run.columns(0, layer, [True])
        q, k, v, pre = (x[None] for x in columns)
        pipeline.attend(state, layer, q, k, v, key_pre=pre, query_pre=before(q))
    with memory.only(state, 0), pytest.raises(CapacityError):
        pipeline.commit(state)
    assert state.call is None and state.lengths[0] == run.at[0] + 1
    assert pipeline.due(state) == [True]
    at = run.at[0]
    for layer, oracle in enumerate(run.oracles[0]):
        oracle.decode(*(x[:, at : at + 1] for x in run.streams[0][layer]))
    run.advance([1])
    with memory.only(state, 0), pytest.raises(CapacityError):
        pipeline.begin(state, [1], "decode")
    assert state.call is None
    run.decode()
    run.check()
    assert digest(fork) == digest(spare) == kept


def test_an_eviction_at_the_cap_needs_no_page():
    """Kept tokens move together in place: a full pool can always be made smaller."""
    run, lengths = run_of(("all", "all", "tokens"), rows=2)
    run.prompt(lengths)
    pool = run.state.devices.pools[0]
    pool.limit = pool.used
    used = pool.used
    run.end_prompt()
    assert pool.used < used
    run.check()
