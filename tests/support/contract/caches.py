"""Caches beside plain lists of tokens, and what holds for them after whatever was done."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from kvpolicy import CacheSpec, Write
from tests.support.contract.cases import SELECTIONS, Sizes, build, gate
from tests.support.contract.driver import Run, stream
from tests.support.contract.invariants import check_pool, check_report, check_summaries
from tests.support.contract.snapshot import snapshot

SPEC = CacheSpec(
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    page_size=2,
    rollback=5,
    interval=4,
    dtype=torch.float64,
    sliding=(None, 3, None),
)
LENGTH = 120


class Small(Sizes):
    """Sizes at which every policy acts on a prompt of a few pages."""

    @property
    def room(self):
        return 2 * self.spec.page_size + 4


def clear_of_thresholds(sizes, tokens):
    """Turns pre-RoPE keys until no gate's score is so near its threshold that rounding decides."""
    at = torch.arange(LENGTH)
    cu = torch.tensor([0, LENGTH], dtype=torch.int32)
    place = (torch.device("cpu"), torch.float64, "reference")
    gates = [gate(sizes, seed).place(*place) for seed in range(3)]
    for layer, (_, k, v, pre) in enumerate(tokens):
        heads, near = range(k.shape[0]), True
        while near:
            write = Write(k.double(), v, at, cu, layer, heads, key_pre=pre.double())
            close = [(g.scores(write) - g.threshold).abs() < 1e-4 for g in gates]
            close = torch.stack(close).any(0)
            pre[close] = pre[close].roll(1, -1)
            near = bool(close.any())
    return tokens


def twin(oracle):
    """A copy that goes its own way."""
    new = copy.copy(oracle)
    new.alive, new.evicted = oracle.alive.clone(), list(oracle.evicted)
    new.base, new.weights = oracle.base.clone(), list(oracle.weights)
    return new


class Caches(RuleBasedStateMachine):
    """`runs` are caches of one pool beside their oracles; `reached` is a row's longest length.

    Subclasses name the policies and sizes and gather in `log` what each life did.
    """

    admission, eviction, selections = "all", "none", tuple(SELECTIONS)
    spec, window, backend, most, log = SPEC, 4, "reference", 3, []

    @initialize(rows=st.integers(1, 3), data=st.data())
    def make(self, rows, data):
        names = self.admission, data.draw(st.sampled_from(self.selections)), self.eviction
        rows, self.sizes = min(rows, self.most), Small(self.spec, self.window)
        self.pipeline = build(self.sizes, *names, backend=self.backend)
        self.seed, self.names, self.did = 0, names, Counter()
        run = Run(self.pipeline, self.spec, [self.fresh() for _ in range(rows)])
        run.reached = [0] * rows
        self.runs, self.changed = [run], run
        self.feed(run, [self.sizes.length + 3 * row for row in range(rows)])
        run.end_prompt()
        run.decode()
        report = run.check_effect(selection=False)
        if not self.pipeline.selection.neutral and run.reads_less(report):
            self.did["left out"] += 1  # what an eviction leaves may fit a selection's budget

    def teardown(self):
        if set(getattr(self, "did", ())) - {"maintain", "left out"}:
            self.log.append((self.names, self.did))

    def fresh(self):
        self.seed += 1
        tokens = stream(self.spec, LENGTH, self.seed)
        exact = self.spec.dtype == torch.float64
        return tokens if exact else clear_of_thresholds(self.sizes, tokens)

    def pick(self, which, rule):
        self.changed = self.runs[which % len(self.runs)]
        self.did[rule] += 1
        return self.changed

    def feed(self, run, counts):
        run.prompt([max(min(n, LENGTH - 20 - at), 0) for n, at in zip(counts, run.at, strict=True)])

    def ready(self, run, valid):
        """Ends the prompt; whether tokens are left for a decode call."""
        if run.state.pending_end:
            run.end_prompt()
        return max(run.at) + len(valid[0]) <= LENGTH

    def resume(self, tokens, kept):
        """Other tokens after the first `kept`."""
        pairs = zip(tokens, self.fresh(), strict=True)
        return [
            tuple(torch.cat([a[:, :kept], b[:, kept:]], 1) for a, b in zip(old, new, strict=True))
            for old, new in pairs
        ]

    def rearranged(self, run, rows, state):
        """`run` with the sequences `rows` (-1: an empty one) in `state`."""
        new = copy.copy(run)
        new.state = state
        for name in ("at", "pending", "floor", "checked", "reached"):
            setattr(new, name, [getattr(run, name)[r] if r >= 0 else 0 for r in rows])
        new.streams = [run.streams[r] if r >= 0 else self.fresh() for r in rows]
        new.oracles = [[twin(o) for o in run.oracles[r]] if r >= 0 else run.new_row() for r in rows]
        return new

    def replace(self, run, rows):
        self.changed = self.rearranged(run, rows, run.state)
        self.runs[self.runs.index(run)] = self.changed

    @invariant()
    def holds(self):
        changed, self.changed = getattr(self, "changed", None), None
        if changed is None:
            return
        hosts, pools = snapshot([run.state for run in self.runs]), {}
        for run, host in zip(self.runs, hosts, strict=True):
            run.check(host)
            assert [x.evicted_at for x in run.state.sequences] == run.floor
            assert [bool(p) for p in run.pending] == [x.prompt_open for x in run.state.sequences]
            check_summaries(host)
            pools.setdefault(next(iter(host.devices.pools)), []).append(host)
        shared = {pool: check_pool(states) for pool, states in pools.items()}
        host = hosts[self.runs.index(changed)]
        report = self.pipeline.report(host)
        check_report(report, changed.state, host)
        changed.check_report(report)
        assert report.shared_pages == shared[next(iter(host.devices.pools))]
