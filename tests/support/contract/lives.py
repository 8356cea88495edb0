"""The life of a cache and its forks: everything that can be done with them, in any order."""

from __future__ import annotations

import tempfile

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvpolicy import RollbackError
from kvpolicy.store import load, save
from kvpolicy.store.fork import adopt, select_rows
from kvpolicy.store.rollback import crop
from tests.support.contract.caches import LENGTH
from tests.support.contract.contents import digest
from tests.support.contract.slot_lives import SlotRules
from tests.support.contract.told import tell

caches = st.integers(0, 2)
few = st.lists(st.integers(0, 14), min_size=4, max_size=4)


class Life(SlotRules):
    """Rules, each on one of the caches."""

    @rule(which=caches, counts=few)
    def prompt(self, which, counts):
        run = self.pick(which, "prompt")
        self.feed(run, counts[: run.state.batch])

    @rule(which=caches)
    def end_prompt(self, which):
        self.pick(which, "end_prompt").end_prompt()

    @rule(which=caches, steps=st.integers(1, 6))
    def decode(self, which, steps):
        run = self.pick(which, "decode")
        for _ in range(steps):
            if self.ready(run, [[True]]):
                run.decode()

    @rule(
        which=caches,
        valid=st.lists(st.integers(0, 255), min_size=4, max_size=4),
        columns=st.integers(1, 8),
    )
    def verify(self, which, valid, columns):
        run = self.pick(which, "verify")
        valid = [[bool(bits >> c & 1) for c in range(columns)] for bits in valid[: run.state.batch]]
        if self.ready(run, valid):
            run.decode(valid)

    @rule(which=caches, counts=few, layer=st.integers(0, 3), decodes=st.booleans())
    def abort(self, which, counts, layer, decodes):
        run = self.pick(which, "abort")
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
        if decodes and max(counts) <= self.spec.rollback:
            pairs = zip(run.reached, run.at, counts, run.state.active, strict=True)
            run.reached = [max(r, at + n * on) for r, at, n, on in pairs]

    @rule(
        which=caches,
        columns=st.integers(1, 7),
        counts=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    )
    def draft(self, which, columns, counts):
        """Assisted decoding: a verify call, and the refused tokens are taken back."""
        run = self.pick(which, "draft")
        valid = [[True] * columns] * run.state.batch
        if self.ready(run, valid):
            run.decode(valid)
            self.crop(which=which, counts=counts)

    @rule(which=caches)
    def crop_all(self, which):
        self.did["crop_all"] += 1
        self.crop(which=which, counts=[LENGTH] * 4)

    @rule(which=caches, counts=st.lists(st.integers(0, 7), min_size=4, max_size=4))
    def crop(self, which, counts):
        run = self.pick(which, "crop")
        counts = [min(n, at) for n, at in zip(counts[: run.state.batch], run.at, strict=True)]
        allowed = all(
            n == 0 or (at - n >= floor and (n == at or at - n >= max(top, at) - self.spec.rollback))
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

    @precondition(lambda self: len(self.runs) < 3)
    @rule(which=caches, data=st.data())
    def fork(self, which, data):
        run = self.pick(which, "fork")
        rows = data.draw(st.lists(st.integers(-1, run.state.batch - 1), min_size=1, max_size=3))
        new = self.rearranged(run, rows, select_rows(run.state, rows))
        at = [LENGTH if r < 0 else run.at[r] for r in rows]
        new.streams = [self.resume(s, n) for s, n in zip(new.streams, at, strict=True)]
        self.runs.append(new)
        self.changed = new

    @rule(which=caches, data=st.data())
    def rearrange(self, which, data):
        """Reorders, repeats, drops and adds sequences in place."""
        run = self.pick(which, "rearrange")
        rows = data.draw(st.lists(st.integers(-1, run.state.batch - 1), min_size=1, max_size=3))
        adopt(run.state, select_rows(run.state, rows))
        self.replace(run, rows)

    @precondition(lambda self: len(self.runs) > 1)
    @rule(which=caches)
    def drop(self, which):
        self.runs.remove(self.pick(which, "drop"))
        self.changed = self.runs[0]

    @rule(which=caches, row=st.integers(0, 3), resumes=st.booleans())
    def finish(self, which, row, resumes):
        run = self.pick(which, "finish")
        run.state.finish([row % run.state.batch])
        if resumes:
            run.state.resume()

    @rule(which=caches)
    def reset(self, which):
        run = self.pick(which, "reset")
        run.state.reset()
        rows = [-1] * run.state.batch
        self.replace(run, rows)

    @rule()
    def maintain(self):
        """What is due happens to every cache; the simplest of lives does nothing else."""
        self.did["maintain"] += 1
        for run in self.runs:
            if self.pipeline.due(run.state):
                self.changed = run
            run.maintain()
            self.pipeline.maintain(run.state)

    @rule(which=caches, steps=st.integers(1, 9), tokens=st.integers(1, 99))
    def reserve(self, which, steps, tokens):
        run = self.pick(which, "reserve")
        before = digest(run.state)
        self.pipeline.reserve(run.state, steps)
        run.state.widen(tokens)
        assert digest(run.state) == before

    @rule(which=caches)
    def save_and_load(self, which):
        """A saved cache goes on in place of the old one."""
        run = self.pick(which, "save_and_load")
        with tempfile.TemporaryDirectory() as folder:
            save(run.state, f"{folder}/cache", self.pipeline, fingerprint="model")
            state, _, _ = load(f"{folder}/cache", self.pipeline, self.spec, fingerprint="model")
        tell(self.pipeline, state)
        assert digest(state) == digest(run.state)
        run.state = state
