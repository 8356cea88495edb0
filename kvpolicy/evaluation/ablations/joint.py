"""Thresholds and eviction budgets together: which pairs are worth their bytes."""

from __future__ import annotations

from typing import Any

import attrs

from ...budget import Tokens
from ...eviction import SnapKV
from ...pipeline import CachePipeline
from ..chart import Chart, Point
from ..sessions.estimates import Estimate
from .fronts import HELD, RIGHT, number
from .lab import Lab


def by_pair(lab: Lab) -> list[Chart]:
    """Every threshold with every budget of SnapKV, the question unseen."""
    gate, length = lab.gate(), lab.recipe.length
    window = lab.recipe.training.window
    points = []
    for tau in lab.recipe.taus:
        for part in (None, *lab.recipe.parts):
            cap = "no cap" if part is None else f"cap {part:.3g}"
            pipeline = CachePipeline(admission=attrs.evolve(gate, threshold=tau))
            if part is not None:
                budget = Tokens(max(round(part * length), window + 1))
                snap = SnapKV(budget=budget, observation=min(32, window))
                pipeline = attrs.evolve(pipeline, eviction=snap)
            of = lab.measured(f"pair {tau:g} {cap}", pipeline, reads=False)
            points.append(_point(tau, cap, of))
    best = [x for x in points if not any(_beats(y, x) for y in points)]
    marked = [attrs.evolve(x, more={"on the front": float(x in best)}) for x in points]
    note = "On the front: no other pair holds as little or less and answers as well or better."
    return [
        Chart(title="threshold and budget together", x=HELD, y=RIGHT, points=marked, notes=(note,))
    ]


def _point(tau: float, cap: str, of: dict[str, Any]) -> Point:
    score = Estimate(mean=of["accuracy"], standard_error=number(of["accuracy_error"]))
    return Point(
        curve=cap, name=f"tau {tau:g}", x=of["held_asked"], y=score.mean, error=score.standard_error
    )


def _beats(one: Point, other: Point) -> bool:
    return one.x <= other.x and one.y >= other.y and (one.x < other.x or one.y > other.y)
