"""The front over thresholds and budgets: every pair measured, dominated ones left out."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch

from tests.support.evaluation.small import small_gate

pytest.importorskip("transformers")

from kvpolicy import CachePipeline, LocalAttention, SnapKV  # noqa: E402
from kvpolicy.evaluation.grid import cell  # noqa: E402
from kvpolicy.evaluation.models import tiny_llama  # noqa: E402
from kvpolicy.evaluation.search.pareto import Front, Point, pareto  # noqa: E402
from kvpolicy.evaluation.sessions.estimates import Estimate  # noqa: E402
from kvpolicy.evaluation.tasks.prompts import Example, Question  # noqa: E402


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return tuple(torch.randint(0, 512, (count,), generator=generator).tolist())

    questions = tuple(Question(ids(5), ids(3)) for _ in range(2))
    return [Example(context_ids=ids(120), questions=questions) for _ in range(2)]


@pytest.fixture(scope="module")
def pipeline():
    return CachePipeline(admission=small_gate(), eviction=SnapKV(budget=40, observation=8))


def test_every_pair_is_measured(pipeline, examples):
    model, seen = tiny_llama(), []
    found = pareto(
        model,
        pipeline,
        examples,
        admissions=[0.0, 0.5],
        evictions=[None, 40],
        measured=seen.append,
    )
    assert list(found.points) == seen and found.knobs == ("threshold", "budget")
    assert [(x.admission, x.eviction) for x in seen] == [(0, None), (0, 40), (0.5, None), (0.5, 40)]
    full = cell.answer(model, CachePipeline(window=16), examples)
    assert seen[0].fraction == 1
    assert seen[0].log_likelihood.mean == pytest.approx(
        sum(full.scores["log_likelihood"]) / 2, abs=1e-4
    )
    assert seen[1].fraction == pytest.approx((40 + 5 + 1) / 126)
    assert seen[3].fraction < seen[2].fraction < 1 and seen[3].fraction <= seen[1].fraction
    with pytest.raises(ValueError, match="LocalAttention"):
        wrong = attrs.evolve(pipeline, admission=LocalAttention(window=16))
        pareto(model, wrong, examples, admissions=[0.1], evictions=[None])


def test_the_front_holds_what_nothing_beats():
    def point(fraction, accuracy):
        score = Estimate(mean=accuracy, standard_error=math.nan)
        return Point(
            admission=0.1,
            eviction=None,
            fraction=fraction,
            bytes=fraction,
            accuracy=score,
            log_likelihood=score,
        )

    points = [point(*x) for x in ((0.5, 0.9), (0.2, 0.7), (0.3, 0.6), (0.2, 0.5), (0.9, 0.9))]
    best = Front(knobs=("threshold", "budget"), points=tuple(points)).best
    assert [(x.fraction, x.accuracy.mean) for x in best] == [(0.2, 0.7), (0.5, 0.9)]


def test_the_front_is_written_and_drawn(pipeline, examples, tmp_path):
    from kvpolicy.cli.calibrate import _write

    found = pareto(tiny_llama(), pipeline, examples, admissions=[0.5], evictions=[None, 40])
    _write(tmp_path, found, "title")
    record = json.loads((tmp_path / "pareto.json").read_text())
    assert [x["eviction"] for x in record["points"]] == [None, 40]
    assert any(x["best"] for x in record["points"])
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
