"""Plots of an evaluation: scores against cache size, tokens read, and a cap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .grid import FULL, LOSS, SEEN
from .kept_map import ACCENT, INK, MUTED, PAPER
from .results import Row, estimate

if TYPE_CHECKING:
    from .pareto import Front

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
Where = Callable[[Row], float]


def plots(folder: Path, rows: Sequence[Row]) -> None:
    """Saves a plot a task of score by cache size, one by tokens read and one by the cap."""
    rows = [row for row in rows if "skipped" not in row]
    sized = [row for row in rows if not row["family"].endswith(("Quest", "cap"))]
    for task in dict.fromkeys(row["task"] for row in sized):
        _panels(
            folder / f"{task.replace(' ', '-')}.png",
            [row for row in sized if row["task"] == task],
            lambda row: row["held_tokens"] / row["seen_tokens"],
            "cache held per head, window included",
        )
    reads = [row for row in rows if row["family"] in (FULL, "write gate", "Quest", "gate + Quest")]
    _of_family(
        folder / "read.png",
        reads,
        ("Quest", "gate + Quest"),
        lambda row: row["read_tokens"] / row["seen_tokens"],
        "tokens read per step and head",
    )
    capped = [row for row in rows if row["family"] == FULL or row["family"].endswith("cap")]
    _of_family(
        folder / "cap.png",
        capped,
        tuple(name for name in _COLOURS if name.endswith("cap")),
        lambda row: row["keep"],
        "cap per head when the prompt ends, of the context",
    )


def _of_family(
    path: Path, rows: Sequence[Row], families: Sequence[str], x: Where, label: str
) -> None:
    """A plot of the tasks and lengths on which one of the families was measured."""
    places = {(row["task"], row["length"]) for row in rows if row["family"] in families}
    here = [row for row in rows if (row["task"], row["length"]) in places]
    if here:
        _panels(path, here, x, label)


def _panels(path: Path, rows: Sequence[Row], x: Where, label: str) -> None:
    """A row of panels a task, a panel a length; a line a family, full attention dotted."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    size = (4.6 * len(lengths) + 2.8, 3.4 * len(tasks) + 1.0)
    figure = Figure(figsize=size, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(tasks), len(lengths), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for task, row_of_axes in zip(tasks, panels, strict=True):
        for length, axes in zip(lengths, row_of_axes, strict=True):
            here = [row for row in rows if (row["task"], row["length"]) == (task, length)]
            if not here:
                axes.axis("off")
                continue
            _panel(axes, here, "hit_loss" if task == LOSS else "accuracy", x)
            axes.set_title(f"{task}, {length} tokens", color=INK)
            axes.set_xlabel(label, color=MUTED)
            found = zip(*axes.get_legend_handles_labels(), strict=True)
            handles |= {name: handle for handle, name in found}
        kind = "nats on hit tokens" if task == LOSS else "answer tokens right"
        row_of_axes[0].set_ylabel(kind)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130, facecolor=PAPER)


def _panel(axes: Any, rows: Sequence[Row], score: str, x: Where) -> None:
    for family in dict.fromkeys(row["family"] for row in rows):
        found = ((x(row), estimate(row[score])) for row in rows if row["family"] == family)
        points = sorted((at, y.mean, y.standard_error) for at, y in found)
        if family == FULL:
            axes.axhline(points[0][1], color=INK, linestyle=":", label=family)
            continue
        seen = SEEN in family
        axes.errorbar(
            [at for at, _, _ in points],
            [mean for _, mean, _ in points],
            yerr=[0.0 if math.isnan(error) else error for _, _, error in points],
            color=_COLOURS.get(family),
            linestyle="--" if seen else "-",
            marker="s" if seen else "o",
            markersize=5,
            capsize=2,
            label=family,
        )
    _percent(axes.xaxis)
    axes.set_xlim(left=0)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(axis: Any) -> None:
    """Ticks at whole percents."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def front(path: Path, found: Front, title: str) -> None:
    """Saves a plot of all points, a line an eviction budget, and the front."""
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
    _percent(axes.xaxis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, facecolor=PAPER)
