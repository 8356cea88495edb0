"""Sequences as slots: what is done with one of them while the others stay."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvpolicy.store import clear, move, park, side_state, unpark
from kvpolicy.store.fork import select_rows
from tests.support.contract.caches import Caches, twin
from tests.support.contract.contents import digest

caches, rows = st.integers(0, 2), st.integers(0, 3)
NUMBERS = ("at", "pending", "floor", "checked", "reached")
FIELDS = (*NUMBERS, "streams", "oracles")


def addresses(state):
    """Where a cache's own buffers lie, which captured steps read and write."""
    own = [state.on(x) for x in state.layers]
    found = [t for x in own for t in (x.lengths, x.final, x.active)]
    found += [t for x in state.layers for t in (x.table, *x.buffers.values())]
    return [t.data_ptr() for t in found]


class SlotRules(Caches):
    """Rules on single sequences of the caches; `parked` wait outside with what is known of them."""

    @property
    def parked(self):
        return self.__dict__.setdefault("_parked", [])

    def take_row(self, run, row):
        """What is known of a sequence; the run forgets it."""
        known = {name: getattr(run, name)[row] for name in FIELDS}
        self.put_row(run, row, dict.fromkeys(NUMBERS, 0) | self.unknown(run))
        return known

    def unknown(self, run):
        return {"streams": self.fresh(), "oracles": run.new_row()}

    def put_row(self, run, row, known):
        for name, value in known.items():
            values = list(getattr(run, name))
            values[row] = value
            setattr(run, name, values)

    def refused(self, runs, call, *args):
        before = [digest(run.state) for run in runs]
        with pytest.raises(ValueError, match="slot|source|parked"):
            call(*args)
        assert [digest(run.state) for run in runs] == before

    @precondition(lambda self: len(self.runs) < 3)
    @rule(which=caches, batch=st.integers(1, 2))
    def side(self, which, batch):
        """A cache for prompts beside another one."""
        run = self.pick(which, "side")
        self.runs.append(self.rearranged(run, [-1] * batch, side_state(run.state, batch)))

    @rule(which=caches, row=rows, into=caches, slot=rows)
    def move(self, which, row, into, slot):
        source = self.pick(which, "move")
        target = self.changed = self.runs[into % len(self.runs)]
        row, slot = row % source.state.batch, slot % target.state.batch
        alike = target.state.devices.pools == source.state.devices.pools
        if target.at[slot] or not alike or (target is source and row == slot):
            self.refused([target, source], move, target.state, slot, source.state, row)
            return
        self.in_place(target, source.at[row], move, target.state, slot, source.state, row)
        assert not source.state.active[row] and source.state.lengths[row] == 0
        self.put_row(target, slot, self.take_row(source, row))

    def in_place(self, run, length, call, *args):
        """Calls; no buffer of the cache has moved if tables and numbers were wide enough."""
        layers = run.state.managed
        wide = all(x.table.shape[2] * x.pool.page_size >= length for x in layers)
        wide &= all(x.numbers is None or x.numbers.stored.shape[2] >= length for x in layers)
        before = addresses(run.state)
        call(*args)
        assert not wide or addresses(run.state) == before

    @rule(which=caches, gone=st.lists(rows, max_size=3))
    def clear(self, which, gone):
        run = self.pick(which, "clear")
        gone = [row % run.state.batch for row in gone]
        active, before = run.state.active, addresses(run.state)
        clear(run.state, gone)
        assert addresses(run.state) == before
        assert run.state.active == [on and row not in gone for row, on in enumerate(active)]
        for row in gone:
            self.take_row(run, row)

    @rule(which=caches, row=rows)
    def park(self, which, row):
        run = self.pick(which, "park")
        row %= run.state.batch
        parked = park(run.state, row)
        assert parked.tokens == run.at[row] and run.state.lengths[row] == 0
        self.parked.append((parked, self.take_row(run, row)))
        del self.parked[:-2]

    @precondition(lambda self: self.parked)
    @rule(which=caches, slot=rows, again=st.booleans())
    def unpark(self, which, slot, again):
        """What was parked goes on; it may do so more than once."""
        run, (parked, known) = self.pick(which, "unpark"), self.parked[0]
        slot %= run.state.batch
        alike = tuple(pool() for pool in parked.pools) == run.state.devices.pools
        if run.at[slot] or not alike:
            self.refused([run], unpark, run.state, slot, parked)
            return
        self.in_place(run, parked.tokens, unpark, run.state, slot, parked)
        if again:
            known = known | {
                "oracles": [twin(oracle) for oracle in known["oracles"]],
                "streams": self.resume(known["streams"], known["at"]),
            }
        else:
            self.parked.pop(0)
        self.put_row(run, slot, known)

    @rule(which=caches, row=rows, slot=rows)
    def join_fork(self, which, row, slot):
        """A copy of a sequence goes its own way in a free slot: a shared prefix."""
        run = self.pick(which, "join_fork")
        row, slot = row % run.state.batch, slot % run.state.batch
        if run.at[slot] or row == slot:
            return
        fork = self.rearranged(run, [row], select_rows(run.state, [row]))
        fork.streams = [self.resume(fork.streams[0], fork.at[0])]
        move(run.state, slot, fork.state, 0)
        self.put_row(run, slot, self.take_row(fork, 0))
