"""Random lives of a cache and its forks against plain lists of tokens."""

from __future__ import annotations

import os

import attrs
import pytest

from tests.support.contract.cases import ADMISSIONS, EVICTIONS, SELECTIONS
from tests.support.contract.kinds import KINDS, first_met, meet
from tests.support.contract.lives import Life
from tests.support.contract.living import DEVICE, KERNELS, PAIRS, live
from tests.support.on_gpu import on_gpu

MET = meet("admission", "eviction")
FIRST = first_met("admission", "eviction")
RULES = {name for name in dir(Life) if hasattr(getattr(Life, name), "hypothesis_stateful_rule")}
# Lives of the slow tests. With each selection beside each pair they would take hours: every eighth
# pair lives, all of them by hand: KVPOLICY_LIVES=10000 python -m pytest -m slow tests/contract
LIVES = int(os.environ.get("KVPOLICY_LIVES", "1000"))
LIVING = PAIRS if LIVES >= 10000 else PAIRS[::8]


@pytest.mark.parametrize(
    "admission, eviction",
    [pytest.param(*pair, marks=() if pair in FIRST else pytest.mark.slow) for pair in MET],
)
def test_lives(admission, eviction):
    """A few lives of every policy beside each kind of the others."""
    number = MET.index((admission, eviction))
    selections = tuple(names[number % len(names)] for names in KINDS["selection"].values())
    log = live(admission, eviction, len(selections), selections=selections)
    assert {names for names, _ in log} == {(admission, s, eviction) for s in selections}
    assert any("left out" in rules for _, rules in log)  # a selection read less than there was


def test_every_policy_lives():
    for pairs in (FIRST, LIVING):
        assert {a for a, _ in pairs} == set(ADMISSIONS) and {e for _, e in pairs} == set(EVICTIONS)
    for admissions in KINDS["admission"].values():
        for evictions in KINDS["eviction"].values():
            assert any(a in admissions and e in evictions for a, e in FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("admission, eviction", LIVING)
def test_many_lives(admission, eviction):
    log = live(admission, eviction, -(-LIVES // len(LIVING)))
    did = set().union(*(rules for _, rules in log))
    assert len(log) < 14 or len(RULES - did) <= 2
    assert {names for names, _ in log} == {(admission, s, eviction) for s in SELECTIONS}
    assert "left out" in did


def interpreted(eviction, count):
    """Short lives on interpreted kernels, with other policies beside each eviction."""
    number = list(EVICTIONS).index(eviction)
    admission, selection = (sorted(x)[number % len(x)] for x in (ADMISSIONS, SELECTIONS))
    spec = attrs.evolve(KERNELS["spec"], layers=2, heads=2, kv_heads=1, sliding=())
    options = {**KERNELS, "spec": spec, "most": 1, "steps": 3, "selections": (selection,)}
    assert len(live(admission, eviction, count, **options)) >= count


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled lives say more")
@pytest.mark.parametrize("kind", KINDS["eviction"])
def test_interpreted_lives(kind):
    interpreted(KINDS["eviction"][kind][0], 1)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled lives say more")
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_many_interpreted_lives(eviction):
    interpreted(eviction, 2)


@on_gpu("admission, eviction", PAIRS)
def test_compiled_lives(admission, eviction):
    """With KVPOLICY_LIVES=10000, `-m gpu` and `-n 8`: ten thousand lives of compiled kernels."""
    log = live(admission, eviction, -(-LIVES // len(PAIRS)), **KERNELS)
    assert {names for names, _ in log} == {(admission, s, eviction) for s in SELECTIONS}
