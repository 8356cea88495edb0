"""Compaction in small chunks, on shared pages, and policies that fail in an eviction."""

from __future__ import annotations

import gc

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, Tokens, TotalCap
from kvpolicy.budget import Budget
from kvpolicy.calls.evict import evict
from kvpolicy.calls.score import view as view_of
from kvpolicy.eviction import Eviction, SnapKV
from kvpolicy.store import compaction
from kvpolicy.store.fork import select_rows
from tests.support.contract.cases import LargestKey, Sizes, build
from tests.support.contract.contents import contents, digest
from tests.support.contract.driver import Run, stream

SPEC = CacheSpec(
    layers=3, heads=4, kv_heads=2, head_dim=8, page_size=2, interval=4, dtype=torch.float64,
    sliding=(None, 3, None),
)  # fmt: skip
TRIPLES = [("random", "quest", "tokens_decode"), ("all", "user", "adaptive")]


def run_of(names):
    sizes = Sizes(SPEC, window=4)
    lengths = [sizes.length, sizes.length + 7]
    return Run(build(sizes, *names), SPEC, [stream(SPEC, n + 40, n) for n in lengths]), lengths


@pytest.mark.parametrize("names", TRIPLES, ids="-".join)
def test_one_page_at_a_time(names, monkeypatch):
    """With a fork that shares the pages, whose contents must stay."""
    monkeypatch.setattr(compaction, "SCRATCH", 1)
    run, lengths = run_of(names)
    run.prompt(lengths)
    fork = select_rows(run.state, [0, 1])
    before = digest(fork)
    run.end_prompt()
    run.check()
    assert sum(int(x.evicted.sum()) for x in run.state.layers) > 20
    assert digest(fork) == before
    for _ in range(2 * SPEC.interval):
        run.decode()
    run.check()


@attrs.frozen(kw_only=True)
class Fails(LargestKey):
    """Raises from the `after`-th call on that follows `armed[0] = True`."""

    after: int
    armed: list = attrs.field(eq=False, hash=False)

    def summarize(self, keys, valid):
        if self.armed:
            self.armed.append(len(self.armed))
            if len(self.armed) > self.after:
                raise RuntimeError("no summary")
        return LargestKey.summarize(self, keys, valid)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_summary_that_raises_drops_nothing(after, monkeypatch):
    """In the first layer, in its middle, in a later one: the cache is as it was and goes on."""
    monkeypatch.setattr(compaction, "SCRATCH", 1)
    armed = []
    run, lengths = run_of(("all", "all", "tokens"))
    selection = Fails(budget=Tokens(8), after=after, armed=armed)
    run.pipeline = attrs.evolve(run.pipeline, selection=selection)
    run = Run(run.pipeline, SPEC, run.streams)
    run.prompt(lengths)
    before = digest(run.state)
    armed.append(0)
    with pytest.raises(RuntimeError, match="no summary"):
        run.pipeline.end_prompt(run.state)
    assert digest(run.state) == before
    armed.clear()
    run.end_prompt()
    run.check()
    run.decode()


@attrs.frozen
class Largest(Eviction):
    budget: Budget = Tokens(12)

    def score(self, view):
        return view.keys.sum(-1)


@attrs.frozen
class NotANumber(Largest):
    bad: int = 0

    def at(self, layer):
        return attrs.evolve(self, bad=layer == 2)

    def score(self, view):
        scores = super().score(view)
        if self.bad:
            scores[-1, 0, 0] = float("nan")
        return scores


def test_a_nan_in_the_last_layer_drops_nothing():
    _, lengths = run_of(("all", "all", "none"))
    streams = [stream(SPEC, n, n) for n in lengths]
    run = Run(CachePipeline(eviction=NotANumber(), window=4), SPEC, streams, oracle=False)
    run.prompt(lengths)
    before = digest(run.state)
    with pytest.raises(ValueError, match="NotANumber.score: wanted floats without NaN"):
        run.pipeline.end_prompt(run.state)
    assert digest(run.state) == before


def test_a_total_cap_drops_of_the_asked_sequences_only():
    _, lengths = run_of(("all", "all", "none"))
    streams = [stream(SPEC, n, n) for n in lengths]
    pipeline = CachePipeline(eviction=Largest(TotalCap(40)), window=4)
    run = Run(pipeline, SPEC, streams, oracle=False)
    run.prompt(lengths)
    held = torch.stack([layer.counts for layer in run.state.layers if not layer.slides])
    assert (held.sum((0, 2)) > 40).all()
    evict(run.state, [False, True])
    left = torch.stack([layer.counts for layer in run.state.layers if not layer.slides])
    assert torch.equal(left[:, 0], held[:, 0]) and left[:, 1].sum() <= 40


@attrs.frozen
class Watched(Largest):
    """Says which sequences it is asked about, by their lengths."""

    asked: list = attrs.field(factory=list, eq=False)

    @property
    def when(self):
        return "decode"

    def score(self, view):
        self.asked.append((view.lengths.tolist(), tuple(view.valid.shape), view.recent_keys.shape))
        return super().score(view)


def test_only_sequences_that_are_due_are_scored():
    """Of two lengths, so that one is due at a time."""
    _, lengths = run_of(("all", "all", "none"))
    ends = [lengths[0], lengths[1] + 1 + (lengths[0] - lengths[1]) % SPEC.interval]
    streams = [stream(SPEC, n + 20, n) for n in ends]
    policy = Watched()
    run = Run(CachePipeline(eviction=policy, window=4), SPEC, streams, oracle=False)
    run.prompt(ends)
    run.end_prompt()
    managed = sum(not layer.slides for layer in run.state.layers)
    assert [x[0] for x in policy.asked] == [ends] * managed
    for _ in range(SPEC.interval):
        policy.asked.clear()
        run.decode()
        due = [n for n in run.state.lengths if n % SPEC.interval == 0]
        assert len(due) < 2
        for seen, shape, recent in policy.asked:
            assert seen == due and shape[0] == recent[0] == 1
        assert len(policy.asked) == managed * len(due)
    left = torch.stack([layer.counts for layer in run.state.layers if not layer.slides])
    assert left.max() <= 12 + SPEC.interval


class Counting:
    """The state's ops, counting calls that read whole pages."""

    def __init__(self, ops):
        self.ops, self.called = ops, []

    def __getattr__(self, name):
        self.called.append(name)
        return getattr(self.ops, name)


def test_pages_of_a_cache_that_is_gone_are_not_shared(monkeypatch):
    run, lengths = run_of(("all", "all", "tokens"))
    run.prompt(lengths)
    fork = select_rows(run.state, [0, 1])
    for pool in run.state.devices.pools:
        monkeypatch.setattr(pool, "take", None)
    del fork
    gc.collect()
    run.end_prompt()
    run.check()


def test_snapkv_copies_no_pages():
    _, lengths = run_of(("all", "all", "none"))
    streams = [stream(SPEC, n, n) for n in lengths]
    pipeline = CachePipeline(eviction=SnapKV(budget=12, observation=4), window=4)
    run = Run(pipeline, SPEC, streams, oracle=False)
    run.prompt(lengths)
    before = [contents(run.state, 0, row) for row in range(2)]
    run.state.ops = Counting(run.state.ops)
    pipeline.end_prompt(run.state)
    assert set(run.state.ops.called) == {"window_scores", "keep_best", "move_kept"}
    assert run.state.ops.called.count("move_kept") == 1  # both layers that do not slide
    for row in range(2):
        for old, new in zip(before[row], contents(run.state, 0, row), strict=True):
            kept = torch.isin(old["at"], new["at"])
            assert kept.sum() == len(new["at"]) == 8
            assert torch.equal(old["k"][kept], new["k"]) and torch.equal(old["v"][kept], new["v"])


def test_a_view_reads_what_is_asked_for():
    _, lengths = run_of(("all", "all", "none"))
    streams = [stream(SPEC, n, n) for n in lengths]
    pipeline = CachePipeline(eviction=SnapKV(budget=12, observation=4), window=4)
    run = Run(pipeline, SPEC, streams, oracle=False)
    run.prompt(lengths)
    state = run.state
    wanted = [contents(state, 0, row) for row in range(2)]
    state.ops = ops = Counting(state.ops)
    view = view_of(state, state.layers[0], int(state.layers[0].counts.max()))
    changed = view._replace(scale=2.0)
    assert not ops.called and changed.scale == 2.0
    assert torch.equal(view.marked, view.valid) and view.positions.any()
    assert ops.called == ["read_meta"]
    assert view.keys is view.keys and view.values.any()
    assert ops.called == ["read_meta", "read_pages"]
    for row, heads in enumerate(wanted):
        for h, head in enumerate(heads):
            n = len(head["at"])
            assert torch.equal(view.keys[row, h, :n], head["k"])
            assert torch.equal(view.values[row, h, :n], head["v"])
            assert torch.equal(view.positions[row, h, :n], head["at"])
            assert not view.keys[row, h, n:].any() and not view.positions[row, h, n:].any()
    assert torch.equal(changed.keys, view.keys)
