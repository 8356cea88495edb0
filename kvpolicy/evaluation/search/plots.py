"""A plot of the points of a search and their front."""

from __future__ import annotations

from pathlib import Path

from ..._extras import extra
from ..grid.plots import percent
from ..look.kept_map import ACCENT, INK, MUTED, PAPER
from .pareto import Front


def front(path: Path, found: Front, title: str) -> None:
    """Saves a plot of all points, a line an eviction budget, and the front."""
    with extra("plots"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    for budget in dict.fromkeys(point.eviction for point in found.points):
        here = sorted(
            (point.fraction, point.accuracy.mean)
            for point in found.points
            if point.eviction == budget
        )
        label = "no eviction" if budget is None else f"{found.knobs[1]} {budget:g}"
        axes.plot(*zip(*here, strict=True), marker="o", markersize=4, label=label)
    best = [(point.fraction, point.accuracy.mean) for point in found.best]
    axes.plot(*zip(*best, strict=True), color=ACCENT, linewidth=4, alpha=0.35, label="front")
    axes.set_title(title, color=INK)
    axes.set_xlabel("cache held per head, window included", color=MUTED)
    axes.set_ylabel("answer tokens right")
    percent(axes.xaxis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, facecolor=PAPER)
