"""A plot of the points of a search and their front."""

from __future__ import annotations

import math
from pathlib import Path

import attrs

from ..._pictures import DPI, INK, NEUTRAL, axes_of, curve, legend, looks, new_figure, percent
from .pareto import Front

_BUDGETS = "ovD^sP<>"
_NOTE = "Mean and standard error over contexts."


def front(path: Path, found: Front, title: str) -> None:
    """Saves a plot of all points, a line an eviction budget, and the front behind them."""
    figure = new_figure(8.2, 5.2, title, _NOTE)
    ((axes,),) = axes_of(figure, 1, 1)
    best = [(point.fraction, point.accuracy.mean) for point in found.best]
    axes.plot(*zip(*best, strict=True), color=NEUTRAL, linewidth=6, alpha=0.5, label="front")
    method = "gate + SnapKV" if found.knobs[0] == "threshold" else "DuoAttention + SnapKV"
    alone = "write gate" if found.knobs[0] == "threshold" else "DuoAttention"
    both = looks([alone, method])
    for number, budget in enumerate(dict.fromkeys(point.eviction for point in found.points)):
        here = [point for point in found.points if point.eviction == budget]
        here.sort(key=lambda point: point.fraction)
        look = both[alone if budget is None else method]
        look = attrs.evolve(look, marker=_BUDGETS[number % len(_BUDGETS)])
        label = "no eviction" if budget is None else f"{found.knobs[1]} {budget:g}"
        errors = [point.accuracy.standard_error for point in here]
        errors = [0.0 if math.isnan(error) else error for error in errors]
        means = [point.accuracy.mean for point in here]
        curve(axes, [point.fraction for point in here], means, errors, errors, look, label)
    if found.full is not None:
        axes.axhline(found.full.mean, color=INK, linestyle=":", label="full")
    axes.set_xlabel("cache held per head, window included", color=INK, fontsize=9.5)
    axes.set_ylabel("answer tokens right", color=INK, fontsize=9.5)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.03)
    percent(axes.xaxis)
    legend(figure, [axes], last="full")
    figure.savefig(path, dpi=DPI)
