"""A gate on kinds of text that it was not trained on, and thresholds adapted to each request."""

from __future__ import annotations

import statistics
from functools import partial

import attrs
from torch import Tensor

from ...admission import WriteGate
from ...pipeline import CachePipeline
from ..chart import Chart, Point
from ..search.calibrate import calibrate, measure
from .fronts import HELD, TAU_NOTE, full, number, over_taus
from .lab import Lab, Pipelines

PROSE = "prose"


def by_kind(lab: Lab) -> list[Chart]:
    """Loss, and answers about needles, of each kind as parts of full attention's."""
    gate = lab.gate()
    names = (
        ("loss", "held", "next-token loss / full"),
        ("accuracy", "held_asked", "answers / full"),
    )
    points: dict[str, list[Point]] = {name: [] for name, _, _ in names}
    for kind in lab.asked:
        whole = full(lab, kind)[2]
        for point, of in over_taus(lab, "base", gate, kind):
            for name, held, _ in names:
                if of.get(name) is not None and whole[name]:
                    points[name].append(
                        Point(curve=kind or PROSE, name=point, x=of[held], y=of[name] / whole[name],
                              more={"full": whole[name]})
                    )  # fmt: skip
    title = "trained on prose, asked elsewhere"
    return [
        Chart(title=title, x=HELD, y=y, points=points[name], notes=(TAU_NOTE,))
        for name, _, y in names
        if points[name]
    ]


def by_request(lab: Lab) -> list[Chart]:
    """One threshold for all requests, or one for each that gives it a wanted part of the cache.

    The threshold of a request is searched on its first half, which a server has read before it
    must decide; its size and loss are of the whole.
    """
    gate, rows = lab.gate(), []
    points: list[Point] = []
    for part in lab.recipe.parts:
        fixed = _threshold(lab, gate, lab.documents()[0], part)
        for kind in lab.asked:
            how: dict[str, Pipelines] = {
                "one tau": CachePipeline(admission=attrs.evolve(gate, threshold=fixed)),
                "tau of the request": partial(_adapted, lab, gate, part),
            }
            for curve, pipeline in how.items():
                of = lab.measured(f"{curve} {part:.3g}", pipeline, kind)
                rows.append((curve, part, of))
                points.append(
                    Point(curve=curve, name=f"{kind or PROSE}, wanted {part:.3g}", x=of["held"],
                          y=of["loss"], error=number(of["loss_error"]))
                )  # fmt: skip
    spread = [
        f"{curve}, wanted {part:.3g}: held {min(held):.3f} to {max(held):.3f}, "
        f"mean distance {statistics.fmean(abs(x - part) for x in held):.3f}."
        for curve in dict.fromkeys(row[0] for row in rows)
        for part in lab.recipe.parts
        if (held := [of["held"] for name, of_part, of in rows if (name, of_part) == (curve, part)])
    ]
    note = "The one tau gives the wanted part on the first document of prose."
    y = "next-token loss, nats"
    title = "a threshold for all, or for each request"
    return [Chart(title=title, x=HELD, y=y, points=points, notes=(note, *spread))]


def _adapted(lab: Lab, gate: WriteGate, part: float, ids: Tensor) -> CachePipeline:
    tau = _threshold(lab, gate, ids[: len(ids) // 2], part)
    return CachePipeline(admission=attrs.evolve(gate, threshold=tau))


def _threshold(lab: Lab, gate: WriteGate, ids: Tensor, part: float) -> float:
    """The threshold at which a prompt's cache holds about `part` of it, or the nearest."""
    pipeline = CachePipeline(admission=gate)
    try:
        found = calibrate(lab.model, pipeline, [ids], target=f"{100 * part:g}%", tolerance=0.05)
        return float(found.best.value)
    except ValueError:
        # Out of reach: the end that is nearer.
        sizes = {
            tau: measure(
                lab.model, CachePipeline(admission=attrs.evolve(gate, threshold=tau)), [ids]
            ).fraction
            for tau in (0.0, 0.999)
        }
        return min(sizes, key=lambda tau: abs(sizes[tau] - part))
