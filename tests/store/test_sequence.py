"""Every host number of a sequence is forked, reset, saved and loaded with the others."""

from __future__ import annotations

import attrs

from kvpolicy.store import load, save
from kvpolicy.store.fork import select_rows
from kvpolicy.store.sequence import SequenceState
from tests.support.store.saved import PIPELINE, SPEC, filled


def marked(state):
    """Gives every number of every sequence a value of its own, and returns them all."""
    names = [field.name for field in attrs.fields(SequenceState)]
    for place, row in enumerate(state.sequences):
        for number, name in enumerate(name for name in names if name != "length"):
            kind = type(getattr(row, name))
            setattr(row, name, kind((place + number) % 2) if kind is bool else 100 * place + number)
    return [attrs.asdict(row) for row in state.sequences]


def test_a_fork_has_them() -> None:
    state = filled()
    wanted = marked(state)
    rows = [*reversed(range(state.batch)), -1]
    found = [attrs.asdict(row) for row in select_rows(state, rows).sequences]
    assert found == [*reversed(wanted), attrs.asdict(SequenceState())]
    assert [attrs.asdict(row) for row in state.sequences] == wanted


def test_a_file_has_them(tmp_path) -> None:
    state = filled()
    wanted = marked(state)
    save(state, tmp_path / "cache", PIPELINE)
    back, _, _ = load(tmp_path / "cache", PIPELINE, SPEC)
    assert [attrs.asdict(row) for row in back.sequences] == wanted


def test_reset_forgets_them() -> None:
    state = filled()
    marked(state)
    state.reset()
    assert state.sequences == [SequenceState()] * state.batch
