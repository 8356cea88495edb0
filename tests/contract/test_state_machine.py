"""Random lives of a cache and its forks against plain lists of tokens."""

from __future__ import annotations

import copy
import os
import tempfile

import pytest
import torch
from cases import Sizes, build
from contents import digest
from driver import Run, stream
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from invariants import check_states

from kvpolicy import CacheSpec, RollbackError
from kvpolicy.store import load, save
from kvpolicy.store.rollback import crop
from kvpolicy.store.rows import adopt, select_rows

PIPELINES = (
    ("random", "quest", "none"),
    ("gate", "user", "tokens_decode"),
    ("all", "quest_each", "cap_decode"),
    ("random", "per_layer", "at_end"),
    ("any_of", "quest_first", "adaptive"),
    ("all", "all", "per_layer_decode"),
    ("all", "quest", "per_layer_mixed"),
    ("all", "quest", "none"),
    ("gate", "all", "none"),
    ("duo", "user", "none"),
)
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
LENGTH = 160
caches = st.integers(0, 2)
few = st.lists(st.integers(0, 14), min_size=4, max_size=4)


class Life(RuleBasedStateMachine):
    """`runs` are caches of one pool beside their oracles; `reached` is a row's longest length."""

    @initialize(names=st.sampled_from(PIPELINES), rows=st.integers(1, 3))
    def make(self, names, rows):
        self.sizes = Sizes(SPEC, window=4)
        self.pipeline = build(self.sizes, *names)
        self.seed = 0
        run = Run(self.pipeline, SPEC, [self.fresh() for _ in range(rows)])
        run.reached = [0] * rows
        self.runs = [run]
        self.feed(run, [20] * rows)
        run.end_prompt()

    def fresh(self):
        self.seed += 1
        return stream(SPEC, LENGTH, self.seed)

    def pick(self, which):
        return self.runs[which % len(self.runs)]

    def feed(self, run, counts):
        run.prompt([max(min(n, LENGTH - 20 - at), 0) for n, at in zip(counts, run.at, strict=True)])

    def ready(self, run, valid):
        """Ends the prompt; whether tokens are left for a decode call."""
        if run.state.pending_end:
            run.end_prompt()
        return max(run.at) + len(valid[0]) <= LENGTH

    @rule(which=caches, counts=few)
    def prompt(self, which, counts):
        run = self.pick(which)
        self.feed(run, counts[: run.state.batch])

    @rule(which=caches)
    def end_prompt(self, which):
        self.pick(which).end_prompt()

    @rule(which=caches, steps=st.integers(1, 6))
    def decode(self, which, steps):
        run = self.pick(which)
        for _ in range(steps):
            if self.ready(run, [[True]]):
                run.decode()

    @rule(
        which=caches,
        valid=st.lists(st.integers(0, 255), min_size=4, max_size=4),
        columns=st.integers(1, 8),
    )
    def verify(self, which, valid, columns):
        run = self.pick(which)
        valid = [[bool(bits >> c & 1) for c in range(columns)] for bits in valid[: run.state.batch]]
        if self.ready(run, valid):
            run.decode(valid)

    @rule(which=caches, counts=few, layer=st.integers(0, SPEC.layers), decodes=st.booleans())
    def abort(self, which, counts, layer, decodes):
        run = self.pick(which)
        counts = counts[: run.state.batch]
        valid = [[c < n for c in range(max(counts))] for n in counts]
        if max(counts) == 0 or (decodes and not self.ready(run, valid)):
            return
        if max(run.at) + max(counts) > LENGTH:
            return
        run.maintain()
        self.pipeline.maintain(run.state)
        before = digest(run.state)
        with pytest.raises(InterruptedError):
            run.decode(valid, layer) if decodes else run.prompt(counts, layer)
        self.pipeline.abort(run.state)
        assert digest(run.state) == before
        if decodes and max(counts) <= SPEC.rollback:
            pairs = zip(run.reached, run.at, counts, run.state.active, strict=True)
            run.reached = [max(r, at + n * on) for r, at, n, on in pairs]

    @rule(
        which=caches,
        columns=st.integers(1, 7),
        counts=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    )
    def draft(self, which, columns, counts):
        """Assisted decoding: a verify call, and the refused tokens are taken back."""
        run = self.pick(which)
        valid = [[True] * columns] * run.state.batch
        if self.ready(run, valid):
            run.decode(valid)
            self.crop(which=which, counts=counts)

    @rule(which=caches)
    def crop_all(self, which):
        self.crop(which=which, counts=[LENGTH] * 4)

    @rule(which=caches, counts=st.lists(st.integers(0, 7), min_size=4, max_size=4))
    def crop(self, which, counts):
        run = self.pick(which)
        counts = [min(n, at) for n, at in zip(counts[: run.state.batch], run.at, strict=True)]
        allowed = all(
            n == 0 or (at - n >= floor and (n == at or at - n >= max(top, at) - SPEC.rollback))
            for n, at, floor, top in zip(counts, run.at, run.floor, run.reached, strict=True)
        )
        if not allowed:
            before = digest(run.state)
            with pytest.raises(RollbackError):
                crop(run.state, counts)
            assert digest(run.state) == before
            return
        crop(run.state, counts)
        for row, n in enumerate(counts):
            run.reached[row] = max(run.reached[row], run.at[row]) if run.at[row] > n else 0
            run.at[row] -= n
            run.checked[row] = min(run.checked[row], run.at[row]) if n else run.checked[row]
            run.streams = list(run.streams)
            run.streams[row] = self.resume(run.streams[row], run.at[row]) if n else run.streams[row]
            for oracle in run.oracles[row]:
                oracle.crop(n)

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
        new.oracles = [copy.deepcopy(run.oracles[r]) if r >= 0 else run.new_row() for r in rows]
        return new

    @precondition(lambda self: len(self.runs) < 3)
    @rule(which=caches, data=st.data())
    def fork(self, which, data):
        run = self.pick(which)
        rows = data.draw(st.lists(st.integers(-1, run.state.batch - 1), min_size=1, max_size=3))
        new = self.rearranged(run, rows, select_rows(run.state, rows))
        at = [LENGTH if r < 0 else run.at[r] for r in rows]
        new.streams = [self.resume(s, n) for s, n in zip(new.streams, at, strict=True)]
        self.runs.append(new)

    @rule(which=caches, data=st.data())
    def rearrange(self, which, data):
        """Reorders, repeats, drops and adds sequences in place."""
        run = self.pick(which)
        rows = data.draw(st.lists(st.integers(-1, run.state.batch - 1), min_size=1, max_size=3))
        adopt(run.state, select_rows(run.state, rows))
        self.runs[self.runs.index(run)] = self.rearranged(run, rows, run.state)

    @precondition(lambda self: len(self.runs) > 1)
    @rule(which=caches)
    def drop(self, which):
        del self.runs[which % len(self.runs)]

    @rule(which=caches, row=st.integers(0, 3), resumes=st.booleans())
    def finish(self, which, row, resumes):
        run = self.pick(which)
        run.state.finish([row % run.state.batch])
        if resumes:
            run.state.resume()

    @rule(which=caches)
    def reset(self, which):
        run = self.pick(which)
        run.state.reset()
        rows = [-1] * run.state.batch
        self.runs[self.runs.index(run)] = self.rearranged(run, rows, run.state)

    @rule(which=caches)
    def save_and_load(self, which):
        """A saved cache goes on in place of the old one."""
        run = self.pick(which)
        with tempfile.TemporaryDirectory() as folder:
            save(run.state, f"{folder}/cache", self.pipeline, fingerprint="model")
            state, _, _ = load(f"{folder}/cache", self.pipeline, SPEC, fingerprint="model")
        assert digest(state) == digest(run.state)
        run.state = state

    @invariant()
    def holds(self):
        for run in getattr(self, "runs", []):
            run.check()
            assert run.state.floor == run.floor
            assert [bool(p) for p in run.pending] == run.state.pending
        if getattr(self, "runs", []):
            pools = [next(iter(run.state.pools.values())) for run in self.runs]
            for pool in set(pools):
                same = [run for run, own in zip(self.runs, pools, strict=True) if own is pool]
                check_states(self.pipeline, [run.state for run in same])


# More lives by hand: KVPOLICY_LIVES=2000 python -m pytest tests/contract/test_state_machine.py
LIVES = int(os.environ.get("KVPOLICY_LIVES", "80"))
Life.TestCase.settings = settings(max_examples=LIVES, stateful_step_count=25)
TestLife = Life.TestCase
