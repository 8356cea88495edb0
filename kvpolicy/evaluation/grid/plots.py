"""Plots of an evaluation: scores against cache size, tokens read, and a cap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

from ..._extras import extra
from ..look.kept_map import ACCENT, INK, MUTED, PAPER
from ..sessions.estimates import estimate
from .records import Measured, Result
from .variants import FULL, SEEN

_LABELS = {"hit_loss": "nats on hit tokens", "accuracy": "answer tokens right"}
_COLOURS = {
    "local": MUTED,
    "random": "#c9a227",
    "DuoAttention": "#8a5fa8",
    "SnapKV": "#7fb8b8",
    f"SnapKV{SEEN}": "#2f8089",
    "write gate": ACCENT,
    "Quest": "#5b8c3a",
    "gate + Quest": INK,
    "SnapKV at a cap": "#7fb8b8",
    f"SnapKV{SEEN} at a cap": "#2f8089",
    "gate + SnapKV at a cap": ACCENT,
    f"gate + SnapKV{SEEN} at a cap": "#8c2f1f",
    "Quest + SnapKV at a cap": "#5b8c3a",
    "gate + Quest + SnapKV at a cap": INK,
}
Where = Callable[["_Point"], float]


@attrs.frozen
class _Point:
    """A measured cell."""

    cell: Result
    measured: Measured


def plots(folder: Path, results: Sequence[Result]) -> None:
    """Saves a plot a task of score by cache size, one by tokens read and one by the cap."""
    points = [_Point(x, x.measured) for x in results if x.measured is not None]
    sized = [x for x in points if not x.cell.family.endswith(("Quest", "cap"))]
    for task in dict.fromkeys(x.cell.task for x in sized):
        _panels(
            folder / f"{task.replace(' ', '-')}.png",
            [x for x in sized if x.cell.task == task],
            lambda x: x.measured.footprint.held,
            "cache held per head, window included",
        )
    reads = (FULL, "write gate", "Quest", "gate + Quest")
    _of_family(
        folder / "read.png",
        [x for x in points if x.cell.family in reads],
        ("Quest", "gate + Quest"),
        lambda x: x.measured.footprint.read,
        "tokens read per step and head",
    )
    _of_family(
        folder / "cap.png",
        [x for x in points if x.cell.family == FULL or x.cell.family.endswith("cap")],
        tuple(name for name in _COLOURS if name.endswith("cap")),
        lambda x: x.cell.keep,
        "cap per head when the prompt ends, of the context",
    )


def _of_family(
    path: Path, points: Sequence[_Point], families: Sequence[str], x: Where, label: str
) -> None:
    """A plot of the tasks and lengths on which one of the families was measured."""
    places = {(p.cell.task, p.cell.length) for p in points if p.cell.family in families}
    here = [p for p in points if (p.cell.task, p.cell.length) in places]
    if here:
        _panels(path, here, x, label)


def _panels(path: Path, points: Sequence[_Point], x: Where, label: str) -> None:
    """A row of panels a task, a panel a length; a line a family, full attention dotted."""
    with extra("plots"):
        from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(p.cell.task for p in points))
    lengths = sorted({p.cell.length for p in points})
    size = (4.6 * len(lengths) + 2.8, 3.4 * len(tasks) + 1.0)
    figure = Figure(figsize=size, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(tasks), len(lengths), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for task, row_of_axes in zip(tasks, panels, strict=True):
        for length, axes in zip(lengths, row_of_axes, strict=True):
            here = [p for p in points if (p.cell.task, p.cell.length) == (task, length)]
            if not here:
                axes.axis("off")
                continue
            _panel(axes, here, x)
            axes.set_title(f"{task}, {length} tokens", color=INK)
            axes.set_xlabel(label, color=MUTED)
            found = zip(*axes.get_legend_handles_labels(), strict=True)
            handles |= {name: handle for handle, name in found}
        row_of_axes[0].set_ylabel(_LABELS[_score(p for p in points if p.cell.task == task)])
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130, facecolor=PAPER)


def _score(points: Iterable[_Point]) -> str:
    """The score that is plotted: all points of a task have one of the two."""
    return next(name for p in points for name in _LABELS if name in p.measured.scores)


def _panel(axes: Any, points: Sequence[_Point], x: Where) -> None:
    score = _score(points)
    for family in dict.fromkeys(p.cell.family for p in points):
        of = [p for p in points if p.cell.family == family]
        found = ((x(p), estimate(p.measured.scores[score])) for p in of)
        line = sorted((at, y.mean, y.standard_error) for at, y in found)
        if family == FULL:
            axes.axhline(line[0][1], color=INK, linestyle=":", label=family)
            continue
        seen = SEEN in family
        axes.errorbar(
            [at for at, _, _ in line],
            [mean for _, mean, _ in line],
            yerr=[0.0 if math.isnan(error) else error for _, _, error in line],
            color=_COLOURS.get(family),
            linestyle="--" if seen else "-",
            marker="s" if seen else "o",
            markersize=5,
            capsize=2,
            label=family,
        )
    percent(axes.xaxis)
    axes.set_xlim(left=0)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)


def percent(axis: Any) -> None:
    """Ticks at whole percents."""
    with extra("plots"):
        from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
