"""Plots of an evaluation: scores against cache size, tokens read, and a cap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

from ..._pictures import DPI, INK, Look, axes_of, curve, legend, looks, new_figure, percent
from ..sessions.estimates import estimate
from .records import Measured, Result
from .variants import FULL, SEEN

_LABELS = {"hit_loss": "nats on hit tokens, less is better", "accuracy": "answer tokens right"}
_READS = (FULL, "write gate", "Quest", "gate + Quest")
_NOTE = "Mean and standard error over contexts; dotted: full attention, its error shaded."
Where = Callable[["_Point"], float]


@attrs.frozen
class _Point:
    """A measured cell."""

    cell: Result
    measured: Measured


def plots(folder: Path, results: Sequence[Result]) -> None:
    """Saves a plot a task of score by cache size, one by tokens read and one of caps."""
    points = [_Point(x, x.measured) for x in results if x.measured is not None]
    sized = [x for x in points if not x.cell.family.endswith(("Quest", "cap"))]
    for task in dict.fromkeys(x.cell.task for x in sized):
        _panels(
            folder / f"{task.replace(' ', '-')}.png",
            [x for x in sized if x.cell.task == task],
            lambda x: x.measured.footprint.held,
            f"{task}: what a cache of part of the size keeps",
            "cache held per head, window included",
        )
    _of_family(
        folder / "read.png",
        [x for x in points if x.cell.family in _READS],
        ("Quest", "gate + Quest"),
        lambda x: x.measured.footprint.read,
        "Reading part of the tokens: gate, Quest and both",
        "tokens read per step and head",
    )
    _of_family(
        folder / "cap.png",
        [x for x in points if x.cell.family == FULL or x.cell.family.endswith("cap")],
        tuple(p.cell.family for p in points if p.cell.family.endswith("cap")),
        lambda x: x.measured.footprint.held,
        "Eviction under a cap, with the question unseen and seen",
        "cache held per head, window included",
    )


def _of_family(
    path: Path,
    points: Sequence[_Point],
    families: Sequence[str],
    x: Where,
    title: str,
    label: str,
) -> None:
    """A plot of the tasks and lengths on which one of the families was measured."""
    places = {(p.cell.task, p.cell.length) for p in points if p.cell.family in families}
    here = [p for p in points if (p.cell.task, p.cell.length) in places]
    if here:
        _panels(path, here, x, title, label)


def _panels(path: Path, points: Sequence[_Point], x: Where, title: str, label: str) -> None:
    """A row of panels a task, a panel a length; a line a family, full attention dotted."""
    tasks = list(dict.fromkeys(p.cell.task for p in points))
    lengths = sorted({p.cell.length for p in points})
    size = max(3.9 * len(lengths), 7.5), 2.7 * len(tasks) + 1.5
    figure = new_figure(*size, title, _NOTE)
    panels = axes_of(figure, len(tasks), len(lengths), sharex=True, sharey="row")
    named = looks(p.cell.family for p in points)
    for task, row_of_axes in zip(tasks, panels, strict=True):
        score = _score(p for p in points if p.cell.task == task)
        for length, axes in zip(lengths, row_of_axes, strict=True):
            here = [p for p in points if (p.cell.task, p.cell.length) == (task, length)]
            if not here:
                axes.axis("off")
                continue
            _panel(axes, here, x, named)
            axes.set_title(f"{task}, {length} tokens", color=INK, fontsize=11)
            axes.set_xlabel(label, color=INK, fontsize=9.5)
            axes.tick_params(labelbottom=True)
        row_of_axes[0].set_ylabel(_LABELS[score], color=INK, fontsize=9.5)
        if score == "accuracy":  # the same for all tasks, so that rows compare
            row_of_axes[0].set_ylim(0, 1.03)
    percent(panels[0, 0].xaxis)
    panels[0, 0].set_xlim(left=0)
    legend(figure, panels.flat, last=FULL)
    figure.savefig(path, dpi=DPI)


def _score(points: Iterable[_Point]) -> str:
    """The score that is plotted: all points of a task have one of the two."""
    return next(name for p in points for name in _LABELS if name in p.measured.scores)


def _panel(axes: Any, points: Sequence[_Point], x: Where, named: dict[str, Look]) -> None:
    score = _score(points)
    for family in dict.fromkeys(p.cell.family for p in points):
        of = [p for p in points if p.cell.family == family]
        found = ((x(p), estimate(p.measured.scores[score])) for p in of)
        line = sorted((at, y.mean, y.standard_error) for at, y in found)
        at = [a for a, _, _ in line]
        means = [mean for _, mean, _ in line]
        errors = [0.0 if math.isnan(error) else error for _, _, error in line]
        if family == FULL:
            axes.axhline(means[0], color=INK, linestyle=":", label=family)
            axes.axhspan(
                means[0] - errors[0], means[0] + errors[0], color=INK, alpha=0.08, linewidth=0
            )
            continue
        seen = SEEN in family
        look = attrs.evolve(named[family], marker="s") if seen else named[family]
        curve(axes, at, means, errors, errors, look, family, dashed=seen)
