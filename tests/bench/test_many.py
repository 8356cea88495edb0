"""The benchmark of many requests on tiny shapes, and what it says of times."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.bench import many
from kvpolicy.bench.context import Bench


def test_rows_of_a_quick_run() -> None:
    bench = Bench(quick=True, seconds=60)
    (case,) = (x for x in many.cases(bench) if "arrivals" in x.name)
    total, first, between = case.run(bench)
    assert [row.unit for row in (total, first, between)] == ["s", "s", "ms"]
    assert all(row.value and row.value > 0 for row in (total, first, between))
    assert total.rate == pytest.approx(4 * 4 / total.value)
    assert total.extra["at_once"] >= 1 and total.extra["parked"] == 0
    assert first.extra["p50"] <= first.extra["p95"] <= first.extra["p99"]
    assert ("captured" if torch.cuda.is_available() else "eager") in total.extra["decoding"]


def test_the_mixture_is_that_of_other_engines() -> None:
    lengths = many.mixture(32, 4000, 60_000)
    assert sum(lengths) == 1_132_534 and min(lengths) >= 4000 and max(lengths) <= 60_000


def test_times() -> None:
    served = many.Served(
        total=4.0, arrived=[0.0, 1.0], times=[[1.0, 1.5, 3.5], [2.0, 2.1]], at_once=2, parked=0,
        peak=0, decoding="",
    )  # fmt: skip
    assert served.first == [1.0, 1.0]
    assert served.between == pytest.approx([500, 2000, 100])
    assert many.percentiles(range(1, 101)) == {50: 50, 95: 95, 99: 99}
    assert many.percentiles([7.0]) == {50: 7.0, 95: 7.0, 99: 7.0}
    assert many._at_once(served.times) == 2
