"""A room whose slots are filled, parked, moved and emptied while others decode."""

from __future__ import annotations

import attrs
import pytest

from tests.support.contract.cases import ADMISSIONS, EVICTIONS, SELECTIONS
from tests.support.contract.lives import Life
from tests.support.contract.living import DEVICE, KERNELS, live

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
    assert rooms(eviction, 2)


@pytest.mark.slow
def test_rooms_of_every_eviction():
    did = {rule for eviction in EVICTIONS for _, rules in rooms(eviction, 1) for rule in rules}
    assert did >= SLOTS


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled rooms say more")
@pytest.mark.parametrize(
    "eviction", ["h2o_decode", *(pytest.param(x, marks=pytest.mark.slow) for x in FEW[2:])]
)
def test_interpreted_rooms(eviction):
    spec = attrs.evolve(KERNELS["spec"], layers=2, heads=2, kv_heads=1, sliding=())
    rooms(eviction, 1, **KERNELS | {"spec": spec, "most": 2, "steps": 6})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_compiled_rooms(eviction):
    rooms(eviction, 2, **KERNELS)
