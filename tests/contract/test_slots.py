"""A room whose slots are filled, parked, moved and emptied while others decode."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy.store import clear, move, park, side_state, unpark
from tests.support.contract.caches import Small
from tests.support.contract.cases import ADMISSIONS, EVICTIONS, SELECTIONS, build
from tests.support.contract.contents import contents
from tests.support.contract.driver import Run
from tests.support.contract.lives import Life
from tests.support.contract.living import KERNELS, live
from tests.support.contract.snapshot import snapshot
from tests.support.contract.streams import stream
from tests.support.on_gpu import on_gpu

OTHERS = ("verify", "draft", "crop", "crop_all", "fork", "rearrange", "drop", "reset", "reserve")
# Only what a scheduler does: enter, chunk, decode, finish, cancel, park, resume, fork, move, fail.
Room = type("Room", (Life,), dict.fromkeys((*OTHERS, "save_and_load")))
SLOTS = {"move", "clear", "park", "unpark", "join_fork", "side"}
FEW = ("tokens", "h2o_decode", "expected_decode", "trim")


def rooms(eviction, count, **options):
    """Lives of rooms, other policies beside each eviction."""
    number = list(EVICTIONS).index(eviction)
    admission, selection = (sorted(x)[number % len(x)] for x in (ADMISSIONS, SELECTIONS))
    made = {"life": Room, "steps": 24, "selections": (selection,), **options}
    return live(admission, eviction, count, **made)


@pytest.mark.parametrize("eviction", FEW)
def test_rooms(eviction):
    assert rooms(eviction, 1)


@pytest.mark.slow
def test_rooms_of_every_eviction():
    did = {rule for eviction in EVICTIONS for _, rules in rooms(eviction, 1) for rule in rules}
    assert did >= SLOTS


@on_gpu("eviction", EVICTIONS)
def test_compiled_rooms(eviction):
    rooms(eviction, 2, **KERNELS)


def enter(room, slot, tokens, cuts):
    """A prompt beside the others, which decode a token between its chunks."""
    side = Run(room.pipeline, room.spec, [tokens], oracle=False)
    side.state = side_state(room.state)
    for cut in cuts:
        side.prompt([cut])
        room.decode()
    side.end_prompt()
    move(room.state, slot, side.state, 0)
    room.streams[slot], room.at[slot] = tokens, sum(cuts)


def alone(pipeline, spec, tokens, prompt, steps):
    run = Run(pipeline, spec, [tokens], oracle=False)
    run.prompt([prompt])
    run.end_prompt()
    for _ in range(steps):
        run.decode()
    return run.state


@pytest.mark.parametrize(
    "backend, eviction, selection",
    [
        ("reference", "tokens", "quest"),
        ("reference", "at_end", "all"),
        ("triton", "at_end", "all"),
        pytest.param("triton", "tokens", "quest", marks=pytest.mark.slow),
    ],
)
def test_each_holds_what_it_holds_alone(backend, eviction, selection):
    """Bit for bit, under other cuts and other neighbours, one of them parked meanwhile."""
    spec = attrs.evolve(KERNELS["spec"], layers=1, heads=2, kv_heads=1, sliding=())
    pipeline = build(Small(spec, 5), "random", selection, eviction, backend=backend)
    streams = [stream(spec, 60, seed) for seed in range(4)]
    room = Run(pipeline, spec, streams[:1] * 3, oracle=False)
    clear(room.state, range(3))
    enter(room, 2, streams[1], [17, 13])
    enter(room, 0, streams[2], [21])
    waits = park(room.state, 2)
    room.at[2] = 0
    enter(room, 2, streams[3], [5, 19])
    unpark(room.state, 1, waits)
    room.streams[1], room.at[1] = streams[1], waits.tokens
    room.decode()
    assert room.state.lengths == room.at and all(room.state.active)
    for slot, (tokens, prompt) in enumerate([(streams[2], 21), (streams[1], 30), (streams[3], 24)]):
        one = alone(pipeline, spec, tokens, prompt, room.at[slot] - prompt)
        states = snapshot([room.state])[0], snapshot([one])[0]
        found, wanted = (contents(x, 0, row)[0] for x, row in zip(states, (slot, 0), strict=True))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
