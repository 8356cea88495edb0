"""Selections that a prompt's last queries decide, beside every admission and eviction."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CacheSpec, UnsupportedError
from tests.support.contract.cases import ADMISSIONS, EVICTIONS, WHOLE, Sizes, build
from tests.support.contract.contents import digest
from tests.support.contract.driver import Run, streams_of

PAIRS = [(a, "none") for a in ADMISSIONS] + [("all", e) for e in EVICTIONS if e != "none"]
SPEC = CacheSpec(
    layers=2, heads=6, kv_heads=2, head_dim=8, page_size=4, interval=8, dtype=torch.float64
)


# One of the selections beside each pair in turn; the others are slow.
TRIPLES = [
    pytest.param(*pair, selection, marks=pytest.mark.slow if (n - m) % len(WHOLE) else ())
    for n, pair in enumerate(PAIRS)
    for m, selection in enumerate(WHOLE)
]


@pytest.mark.parametrize("admission, eviction, selection", TRIPLES)
def test_pair(admission, eviction, selection):
    sizes = Sizes(SPEC, window=6)
    rows = [sizes.length, sizes.length + 7]
    run = Run(build(sizes, admission, selection, eviction), SPEC, streams_of(sizes, rows, 12, 3))
    run.prompt(rows)
    run.end_prompt()
    for _ in range(12):
        run.decode()
    run.check()
    run.check_effect()


@pytest.mark.parametrize("selection", WHOLE)
def test_more_of_a_prompt_is_refused_by_name(selection):
    sizes = Sizes(SPEC, window=6)
    rows = [sizes.length, 9]
    pipeline = build(sizes, "random", selection)
    run = Run(pipeline, SPEC, streams_of(sizes, rows, 12, 3))
    run.prompt([sizes.length, 0])
    before = digest(run.state)
    name = "FlexPrefill" if selection == "flex" else "VerticalSlash"
    with pytest.raises(UnsupportedError, match=f"{name}: .* in one call.* after {rows[0]} tokens"):
        pipeline.begin(run.state, [1, 3], "prompt")
    assert digest(run.state) == before
    run.prompt([0, 9])  # another sequence's own
    run.decode()
    run.check()
