"""Who reads, decodes, waits and is parked, without a model."""

from __future__ import annotations

import random

import pytest

from kvpolicy.adapters.hf.many.scheduler import Place, Scheduler


def entering(scheduler, free=(None,), need=lambda entry: (1,)):
    return [x.order for x in scheduler.entering(lambda: free, need)]


def read(scheduler):
    """One prompt call; those that have read all go to their slots."""
    parts = scheduler.call()
    for entry, count in parts:
        entry.read += count
        if not entry.left:
            scheduler.end(entry)
    return [(entry.order, count) for entry, count in parts]


def test_first_come_first_served():
    scheduler = Scheduler(3, 2, 10)
    for prompt in (4, 5, 6, 7):
        scheduler.add(prompt, 1)
    assert entering(scheduler) == [0, 1]  # two lanes
    assert read(scheduler) == [(0, 4), (1, 5)]
    assert entering(scheduler) == [2]  # three slots
    assert entering(scheduler) == []
    scheduler.remove(scheduler.entries[0])
    assert entering(scheduler) == [3]


def test_a_call_takes_tokens_up_to_its_budget():
    scheduler = Scheduler(3, 3, 10)
    for prompt in (7, 12, 2):
        scheduler.add(prompt, 1)
    entering(scheduler)
    assert [read(scheduler) for _ in range(4)] == [[(0, 7), (1, 3)], [(1, 9), (2, 1)], [(2, 1)], []]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"tile": 4}, [[(0, 7), (2, 2)], [(1, 8)], [(1, 4)]]),
        ({"whole": True}, [[(0, 7), (2, 2)], [(1, 12)]]),
    ],
)
def test_prompts_are_cut_where_a_selection_lets_them(options, calls):
    scheduler = Scheduler(3, 3, 10, **options)
    for prompt in (7, 12, 2):
        scheduler.add(prompt, 1)
    entering(scheduler)
    assert [read(scheduler) for _ in calls] == calls


def test_a_tile_larger_than_the_budget_goes_alone():
    scheduler = Scheduler(1, 1, 3, tile=8)
    scheduler.add(19, 1)
    entering(scheduler)
    assert [read(scheduler) for _ in range(3)] == [[(0, 8)], [(0, 8)], [(0, 3)]]


def test_nobody_enters_before_an_earlier_one():
    scheduler = Scheduler(4, 4, 10)
    for prompt in (4, 90, 4):
        scheduler.add(prompt, 1)

    def enter():
        free = lambda: [20 - sum(x.prompt for x in scheduler.present)]  # noqa: E731
        return [x.order for x in scheduler.entering(free, lambda entry: (entry.prompt,))]

    assert enter() == [0]
    assert enter() == []
    scheduler.remove(scheduler.entries[0])
    assert enter() == [1]  # alone, whatever it needs
    scheduler.remove(scheduler.entries[0])
    assert enter() == [2]


def test_every_pool_must_have_the_pages():
    scheduler = Scheduler(2, 2, 10)
    scheduler.add(1, 1), scheduler.add(1, 1)
    entering(scheduler)
    scheduler.add(1, 1)
    scheduler.remove(scheduler.entries[0])
    assert entering(scheduler, (9, 2), lambda entry: (3, 3)) == []
    assert entering(scheduler, (9, None), lambda entry: (3, 3)) == [2]


def test_the_youngest_is_parked_and_comes_back_first():
    scheduler = Scheduler(3, 3, 10)
    for _ in range(5):
        scheduler.add(3, 1)
    entering(scheduler)
    read(scheduler)
    youngest = scheduler.youngest()
    assert youngest.order == 2
    scheduler.park(youngest)
    assert entering(scheduler) == []  # until somebody leaves, or it would be parked again
    scheduler.remove(scheduler.entries[0])
    assert entering(scheduler) == [2, 3]
    assert youngest.place is Place.RUNNING and youngest.lane is None and youngest.parked == 1


def test_one_that_is_alone_is_never_parked():
    scheduler = Scheduler(2, 2, 10)
    scheduler.add(3, 1)
    entering(scheduler)
    assert scheduler.youngest() is None


@pytest.mark.parametrize("seed", range(5))
def test_many_arrivals(seed):
    """Nobody gets lost, pages come back, slots and lanes belong to one each."""
    rng = random.Random(seed)
    scheduler = Scheduler(6, 3, 50, tile=rng.choice([None, 8]))
    pages, used, left, gone = 400, {}, 1000, []
    while left or scheduler.entries:
        if left and rng.random() < 0.4:
            scheduler.add(rng.randrange(1, 200), rng.randrange(1, 60), load=[0])
            left -= 1
        free = lambda: [pages - sum(used.values())]  # noqa: E731
        for entry in scheduler.entering(free, lambda entry: (entry.prompt // 2,)):
            used[entry.order] = entry.read + entry.load[0]
        for entry, count in scheduler.call():
            entry.read += count
            used[entry.order] = entry.read
            if not entry.left:
                scheduler.end(entry)
        for entry in scheduler.at(Place.RUNNING):
            entry.load[0] += 1
            used[entry.order] = entry.read + entry.load[0]
        while sum(used.values()) > pages and (entry := scheduler.youngest()):
            scheduler.park(entry)
            del used[entry.order]
        for entry in list(scheduler.entries):
            if entry.load[0] >= entry.most or rng.random() < 0.002:
                scheduler.remove(entry)
                used.pop(entry.order, None)
                gone.append(entry.order)
        present = scheduler.present
        assert {x.order for x in present} == set(used)
        slots = sorted([x.slot for x in present] + scheduler.slots)
        lanes = sorted([x.lane for x in present if x.lane is not None] + scheduler.lanes)
        assert (slots, lanes) == ([*range(6)], [*range(3)])
    assert sorted(gone) == [*range(1000)]
