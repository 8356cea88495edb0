"""Results of an evaluation: one line of JSON a cell, a table, plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from .grid import FULL, LOSS
from .kept_map import ACCENT, INK, MUTED, PAPER
from .score import Estimate

Row = dict[str, Any]
_COLOURS = {
    "local": MUTED,
    "random": "#c9a227",
    "DuoAttention": "#8a5fa8",
    "SnapKV": "#7fb8b8",
    "SnapKV, question seen": "#2f8089",
    "Quest": "#5b8c3a",
    "write gate": ACCENT,
    "composition": INK,
    "composition, question seen": "#0f4c5c",
}


@attrs.frozen
class Store:
    """A folder of results that a later run goes on with."""

    folder: Path = attrs.field(converter=Path)

    def open(self, settings: Row) -> list[Row]:
        """The rows of earlier runs with the same settings.

        Raises:
            ValueError: the folder holds results of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in settings if found.get(name) != settings[name]]
            if other:
                raise ValueError(
                    f"out: {self.folder} holds results of another {', '.join(other)}: "
                    f"{', '.join(repr(found.get(name)) for name in other)}"
                )
        else:
            path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        text = self._cells.read_text(encoding="utf-8") if self._cells.exists() else ""
        if text and not text.endswith("\n"):  # an interrupted run left half a line
            text = text[: text.rfind("\n") + 1]
            self._cells.write_text(text, encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def add(self, row: Row) -> None:
        """Appends the row of a finished cell."""
        with self._cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def summarize(self, rows: Sequence[Row], title: str) -> None:
        """Writes results.json, results.md and a plot a task."""
        (self.folder / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (self.folder / "results.md").write_text(table(rows, title), encoding="utf-8")
        for task in dict.fromkeys(row["task"] for row in rows):
            plot(self.folder / f"{task.replace(' ', '-')}.png", task, rows)

    @property
    def _cells(self) -> Path:
        return self.folder / "cells.jsonl"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over contexts and its standard error."""
    if not values:
        return Estimate(mean=math.nan, standard_error=math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(mean=statistics.fmean(values), standard_error=spread / math.sqrt(len(values)))


def shown(values: Sequence[float]) -> str:
    """Mean and standard error, as far as there are any."""
    found = estimate(values)
    if math.isnan(found.standard_error):
        return "" if math.isnan(found.mean) else f"{found.mean:.3f}"
    return str(found)


def table(rows: Sequence[Row], title: str) -> str:
    """Markdown, one table a task and length."""
    out = [f"# {title}", ""]
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        here = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        scores = ("loss", "hit_loss") if task == LOSS else ("accuracy", "exact", "log_likelihood")
        found = (row.get(scores[0], []) for row in here if row["variant"] == FULL)
        full: list[float] = next(found, [])
        names = ["composition", "cache", "read", "MB"]
        names += [*(score.replace("_", " ") for score in scores), f"{scores[0]} - full", "n"]
        out += [f"## {task}, {length} tokens", "", _line(names)]
        out.append(_line(["---", *["---:"] * (len(names) - 1)]))
        for row in here:
            if "skipped" in row:
                out.append(_line([row["variant"], row["skipped"], *[""] * (len(names) - 2)]))
                continue
            out.append(
                _line(
                    [
                        row["variant"],
                        f"{row['held_tokens'] / row['seen_tokens']:.1%}",
                        f"{row['read_tokens'] / row['seen_tokens']:.1%}",
                        f"{row['bytes'] / 1e6:.2f}",
                        *(shown(row[score]) for score in scores),
                        shown([a - b for a, b in zip(row[scores[0]], full, strict=False)]),
                        str(len(row[scores[0]])),
                    ]
                )
            )
        out.append("")
    return "\n".join(out + [_NOTE, ""])


_NOTE = (
    "Cache: tokens held per head, local window included, of all tokens seen; read: those that the "
    "last token read. A gate's name in brackets: made to hold, for Quest to read, as much as that "
    "gate. MB: all bytes of the cache. Means over n contexts ± their standard errors; the "
    "difference from full attention is paired by context. SnapKV evicts when the prompt ends: "
    "before the question, or after it where the name says that it has seen it; numbers of the two "
    "kinds do not compare. All others answer alike either way."
)


def plot(path: Path, task: str, rows: Sequence[Row]) -> None:
    """Saves the score against the normalised cache size, a panel a length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in rows if row["task"] == task and "skipped" not in row]
    lengths = sorted({row["length"] for row in rows})
    if not lengths:
        return
    score = "hit_loss" if task == LOSS else "accuracy"
    figure = Figure(figsize=(4.6 * len(lengths) + 2.4, 4.4), facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, lengths, strict=True):
        here = [row for row in rows if row["length"] == length]
        for family in dict.fromkeys(row["family"] for row in here):
            points = sorted(
                (_size(row), estimate(row[score]).mean, _error(row[score]))
                for row in here
                if row["family"] == family
            )
            if family == FULL:
                axes.axhline(points[0][1], color=INK, linestyle=":", label=family)
                continue
            seen = family.endswith("question seen")
            axes.errorbar(
                *zip(*((x, y) for x, y, _ in points), strict=True),
                yerr=[e for _, _, e in points],
                color=_COLOURS[family],
                linestyle="none" if family.startswith("composition") else "--" if seen else "-",
                marker="s" if seen else "o",
                markersize=5,
                capsize=2,
                label="Quest (tokens read)" if family == "Quest" else family,
            )
        axes.set_title(f"{length} tokens", color=INK)
        axes.set_xlabel("cache held per head, window included", color=MUTED)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlim(left=0)
        axes.set_facecolor(PAPER)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats on hit tokens" if task == LOSS else "answer tokens right")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.suptitle(task, color=INK, weight="bold")
    figure.savefig(path, dpi=130, facecolor=PAPER)


def _size(row: Row) -> float:
    """What is held; for Quest, which holds all, what is read."""
    tokens = row["read_tokens"] if row["family"].startswith("Quest") else row["held_tokens"]
    return tokens / row["seen_tokens"]


def _error(values: Sequence[float]) -> float:
    error = estimate(values).standard_error
    return 0.0 if math.isnan(error) else error


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
