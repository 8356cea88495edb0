"""Every host number of a sequence is forked, moved, parked, reset and filed with the others."""

from __future__ import annotations

import attrs

from kvpolicy.store import clear, load, move, park, save, side_state, unpark
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


def test_a_slot_has_them() -> None:
    """Moved and parked; nothing of them is left where the sequence was."""
    state, free = filled(), attrs.asdict(SequenceState(active=False))
    wanted = marked(state)
    state.sync_devices()
    side = side_state(state, 2)
    move(side, 1, state, 0)
    assert attrs.asdict(side.sequences[1]) == wanted[0]
    unpark(state, 0, park(side, 1))
    assert [attrs.asdict(row) for row in state.sequences] == wanted
    assert attrs.asdict(side.sequences[1]) == free
    clear(state, range(state.batch))
    assert [attrs.asdict(row) for row in state.sequences] == [free] * state.batch


def test_reset_forgets_them() -> None:
    state = filled()
    marked(state)
    state.reset()
    assert state.sequences == [SequenceState()] * state.batch
