"""Very many sequences through one room: no page is lost, memory stays what it was."""

from __future__ import annotations

import os
import random

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, RandomGate, StreamingLLM
from kvpolicy.store import clear, held_pages, move, park, side_state, unpark
from kvpolicy.store.fork import select_rows

# A million takes about an hour: KVPOLICY_ARRIVALS=1000000 python -m pytest -m slow tests/store
ARRIVALS = int(os.environ.get("KVPOLICY_ARRIVALS", "5000"))
SPEC = CacheSpec(layers=1, heads=1, kv_heads=1, head_dim=2, page_size=2, rollback=1, interval=4)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.3),
    eviction=StreamingLLM(budget=6, sinks=2),
    window=2,
    backend="reference",
)
SLOTS, ENTER = 8, 4


class Arrivals:
    """A room beside a cache for prompts; what happens next is drawn."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.room = PIPELINE.init(SPEC, SLOTS)
        self.room.finish(range(SLOTS))
        self.side = side_state(self.room, ENTER)
        self.parked, self.arrived, self.left = [], 0, 0

    def free(self):
        return [slot for slot, length in enumerate(self.room.lengths) if not length]

    def held(self):
        return [slot for slot, length in enumerate(self.room.lengths) if length]

    def call(self, state, counts, phase):
        PIPELINE.begin(state, counts, phase)
        shape = (1, sum(counts)) if phase == "prompt" else (len(counts), 1, 1)
        PIPELINE.attend(state, 0, *torch.randn(3, *shape, 2))
        PIPELINE.commit(state)

    def enter(self):
        """Prompts in one or two chunks; some are given up between them."""
        free = self.free()
        some = [n < len(free) for n in range(ENTER)]
        for chunk in range(2):
            self.call(self.side, [on * self.rng.randint(chunk, 6) for on in some], "prompt")
            if self.rng.random() < 0.1:
                self.arrived += self.side.lengths[0] > 0
                self.left += self.side.lengths[0] > 0
                clear(self.side, [0])
                some[0] = False
        PIPELINE.end_prompt(self.side)
        for row, length in enumerate(self.side.lengths):
            if length:
                move(self.room, free.pop(), self.side, row)
                self.arrived += 1

    def decode(self):
        for _ in range(self.rng.randint(1, 4)):
            self.call(self.room, [1] * SLOTS, "decode")

    def leave(self):
        gone = [slot for slot in self.held() if self.rng.random() < 0.6]
        clear(self.room, gone)
        self.left += len(gone)

    def park(self):
        if self.held() and len(self.parked) < 3:
            self.parked.append(park(self.room, self.rng.choice(self.held())))

    def go_on(self):
        if self.parked and self.free():
            unpark(self.room, self.free()[0], self.parked.pop(0))

    def fork(self):
        if self.held() and self.free():
            move(self.room, self.free()[0], select_rows(self.room, self.held()[:1]), 0)
            self.arrived += 1

    def check(self):
        (pool,) = self.room.devices.pools
        assert self.arrived == self.left + len(self.held()) + len(self.parked)
        shared = (pool.refs[1 : pool.capacity] - 1).clamp(min=0)
        held = sum(sum(rows) for s in (self.room, self.side) for rows in held_pages(s).values())
        assert pool.used == held - int(shared.sum())
        assert not any(self.side.lengths)


def many(arrivals, seed=0):
    work, steps = Arrivals(seed), 0
    acts = [work.enter, work.enter, work.decode, work.leave, work.leave, work.park, work.go_on]
    acts.append(work.fork)
    capacities = []
    while work.arrived < arrivals:
        work.rng.choice(acts)()
        steps += 1
        if steps % 100 == 0:
            work.check()
            capacities.append(work.room.devices.pools[0].capacity)
    work.check()
    clear(work.room, range(SLOTS))
    work.parked.clear()
    (pool,) = work.room.devices.pools
    assert pool.used == 0 and not pool.refs.any()
    assert sorted(pool.free[: pool.available].tolist()) == list(range(1, pool.capacity))
    return capacities


@pytest.mark.parametrize("arrivals", [150, pytest.param(ARRIVALS, marks=pytest.mark.slow)])
def test_no_page_leaks(arrivals):
    capacities = many(arrivals)
    assert max(capacities) <= 2 * capacities[0]
