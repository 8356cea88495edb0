"""Rows and numbers of tokens that are none: refused, with host and devices as they were."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CapacityError
from kvpolicy.store.fork import select_rows
from kvpolicy.store.rollback import crop
from tests.support.contract.contents import digest
from tests.support.store.saved import PIPELINE, call, filled


def begin(state, lengths, phase="prompt", **how):
    PIPELINE.begin(state, lengths, phase, **how)


NO_COLUMNS = {"valid": torch.ones(2, 0).bool()}
WRONG = [
    (lambda s: crop(s, [1.5, 1]), TypeError, "tokens: wanted ints, got 1.5"),
    (lambda s: crop(s, [True, 1]), TypeError, "tokens: wanted ints, got True"),
    (lambda s: crop(s, [1]), ValueError, "tokens: wanted 2 numbers, got 1"),
    (lambda s: crop(s, [-1, 1]), ValueError, "tokens: sequence 0 holds .*, cannot drop -1"),
    (lambda s: crop(s, [10**30, 1]), ValueError, "tokens: sequence 0 holds .*, cannot drop"),
    (lambda s: begin(s, [1.5, 1]), ValueError, r"lengths: wanted .*, got \[1.5, 1\]"),
    (lambda s: begin(s, [True, 1]), ValueError, r"lengths: wanted .*, got \[True, 1\]"),
    (lambda s: begin(s, [2**31, 1]), CapacityError, "a sequence holds at most 1073741824"),
    (lambda s: begin(s, [0, 0], "decode", **NO_COLUMNS), ValueError, "valid: .*at least one"),
    (lambda s: s.finish([0, 5]), ValueError, "rows: wanted sequences from 0 below 2, got 5"),
    (lambda s: s.finish([-1]), ValueError, "rows: wanted sequences from 0 below 2, got -1"),
    (lambda s: s.finish([True]), TypeError, r"rows: .*, got \[True\]"),
    (lambda s: s.finish([0.0]), TypeError, r"rows: .*, got \[0.0\]"),
    (lambda s: select_rows(s, []), ValueError, "rows: wanted at least one"),
    (lambda s: select_rows(s, [2]), ValueError, "rows: wanted sequences below 2 .*, got 2"),
    (lambda s: select_rows(s, [-2]), ValueError, "rows: wanted sequences below 2 .*, got -2"),
    (lambda s: select_rows(s, [0.5]), ValueError, "rows: wanted sequences below 2 .*, got 0.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_they_change_nothing(change, error, message):
    state = filled()
    before = digest(state)
    with pytest.raises(error, match=message):
        change(state)
    assert state.call is None and digest(state) == before
    assert [row.active for row in state.sequences] == [True, True]
    call(PIPELINE, state, "decode", [1, 1], 3)
