"""Which pairs of an admission's threshold and an eviction's budget are worth their bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import attrs
from transformers import PreTrainedModel

from ..._knob import Knob
from ...adapters.hf import spec_of
from ...eviction import KeepAll
from ...pipeline import CachePipeline
from ..grid.cell import answer
from ..sessions.estimates import Estimate, estimate
from ..tasks.prompts import Example
from .knobs import knob_of


@attrs.frozen(kw_only=True)
class Point:
    """One pair of knob values, measured.

    `eviction` None: nothing is evicted. `fraction` is the part of the tokens that a head holds
    after a question, `bytes` those of one sequence's cache.
    """

    admission: float
    eviction: float | None
    fraction: float
    bytes: float
    accuracy: Estimate
    log_likelihood: Estimate


@attrs.frozen(kw_only=True)
class Front:
    """All points that were measured, and those that no other beats in size and accuracy.

    `full` is the accuracy of full attention on the same questions.
    """

    knobs: tuple[str, str]
    points: tuple[Point, ...]
    full: Estimate | None = None

    @property
    def best(self) -> tuple[Point, ...]:
        """The Pareto front, the smallest cache first."""
        kept = [x for x in self.points if not any(_beats(y, x) for y in self.points)]
        return tuple(sorted(kept, key=lambda point: point.fraction))


def pareto(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    examples: Sequence[Example],
    *,
    admissions: Sequence[float],
    evictions: Sequence[float | None],
    pattern: str | os.PathLike[str] | None = None,
    question_in_prompt: bool = False,
    measured: Callable[[Point], object] = lambda point: None,
) -> Front:
    """Measures every pair of values, and full attention, on the same questions.

    Args:
        model: a model that the adapters serve, with nothing attached.
        pipeline: its admission has a threshold or sparsity, its eviction a budget.
        examples: what to ask.
        admissions: values of the admission's knob.
        evictions: values of the eviction's budget; None evicts nothing.
        pattern: folder of DuoAttention's head values.
        question_in_prompt: whether an eviction at the prompt's end knows the question.
        measured: called with each point.

    Raises:
        ValueError: no values, or a slot of the pipeline has no knob.
    """
    if not admissions or not evictions or not examples:
        raise ValueError("admissions, evictions, examples: wanted at least one of each")
    spec = spec_of(model)
    seen = max(len(x.context_ids) for x in examples)
    sizes = {"layers": spec.layers, "kv_heads": spec.kv_heads}

    def knob(of: CachePipeline, slot: str) -> Knob[CachePipeline]:
        return knob_of(of, seen=seen, slot=slot, pattern=pattern, **sizes)

    points = []
    names = knob(pipeline, "admission").name, knob(pipeline, "eviction").name
    for value in admissions:
        admitting = knob(pipeline, "admission").set(value)
        for budget in evictions:
            if budget is None:
                tried = attrs.evolve(admitting, eviction=KeepAll())
            else:
                tried = knob(admitting, "eviction").set(budget)
            row = answer(model, tried, examples, question_in_prompt=question_in_prompt)
            point = Point(
                admission=value,
                eviction=budget,
                fraction=row.footprint.held,
                bytes=row.footprint.bytes,
                accuracy=estimate(row.scores["accuracy"]),
                log_likelihood=estimate(row.scores["log_likelihood"]),
            )
            measured(point)
            points.append(point)
    plain = CachePipeline(window=pipeline.window)
    dense = answer(model, plain, examples, question_in_prompt=question_in_prompt)
    return Front(knobs=names, points=tuple(points), full=estimate(dense.scores["accuracy"]))


def _beats(one: Point, other: Point) -> bool:
    a, b = one.accuracy.mean, other.accuracy.mean
    no_worse = one.fraction <= other.fraction and a >= b
    return no_worse and (one.fraction < other.fraction or a > b)
