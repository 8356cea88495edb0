"""Curves of points from one or several sources, as JSON, a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .._files import write_text
from .._markdown import table
from .._pictures import DPI, INK, axes_of, curve, legend, looks, new_figure

HERE = "measured here"


@attrs.frozen(kw_only=True)
class Point:
    """One point of a curve; `by` says who measured it, `error` is a standard error of `y`.

    `more` are numbers that the table shows beside it.
    """

    curve: str
    name: str
    x: float
    y: float
    error: float = math.nan
    by: str = HERE
    more: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Chart:
    """Points over named axes; `notes` are sentences that stand below the table."""

    title: str
    x: str
    y: str
    points: Sequence[Point]
    notes: Sequence[str] = ()
    log_x: bool = False
    log_y: bool = False

    def write(self, folder: Path, name: str) -> list[Path]:
        """Saves NAME.json, NAME.md and, where matplotlib is there, NAME.png; the files' paths."""
        folder.mkdir(parents=True, exist_ok=True)
        record = attrs.asdict(self) | {"points": [_json(attrs.asdict(x)) for x in self.points]}
        files = [folder / f"{name}.json", folder / f"{name}.md"]
        write_text(files[0], json.dumps(record, indent=1, allow_nan=False))
        write_text(files[1], self.markdown())
        try:
            self._plot(folder / f"{name}.png")
        except ModuleNotFoundError:
            return files
        return [*files, folder / f"{name}.png"]

    def markdown(self) -> str:
        """A table of all points, a row each, and the notes."""
        more = list(dict.fromkeys(key for point in self.points for key in point.more))
        heads = ["curve", "point", self.x, self.y, *more, "by"]
        rows = [
            [x.curve, x.name, _said(x.x), _said(x.y, x.error),
             *(_said(x.more.get(key, math.nan)) for key in more), x.by]
            for x in self.points
        ]  # fmt: skip
        notes = [line for note in self.notes for line in (note, "")]
        return "\n".join([f"# {self.title}", "", *table(heads, rows), "", *notes])

    def _plot(self, path: Path) -> None:
        figure = new_figure(8.2, 5.4, self.title, "Dashed: as others published.")
        ((axes,),) = axes_of(figure, 1, 1)
        curves = dict.fromkeys((point.curve, point.by) for point in self.points)
        named = looks(dict.fromkeys(name for name, _ in curves))
        for name, by in curves:
            of = [x for x in self.points if (x.curve, x.by) == (name, by)]
            of = sorted((x for x in of if math.isfinite(x.x + x.y)), key=lambda point: point.x)
            errors = [0.0 if math.isnan(point.error) else point.error for point in of]
            label = name if by == HERE else f"{name}, {by}"
            at, values = [point.x for point in of], [point.y for point in of]
            curve(axes, at, values, errors, errors, named[name], label, dashed=by != HERE)
        axes.set_xlabel(self.x, color=INK, fontsize=9.5)
        axes.set_ylabel(self.y, color=INK, fontsize=9.5)
        if self.log_x:
            axes.set_xscale("log")
        if self.log_y:
            axes.set_yscale("log")
        legend(figure, [axes])
        figure.savefig(path, dpi=DPI)


def _said(value: float, error: float = math.nan) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.4g}" + ("" if math.isnan(error) else f" ± {error:.2g}")


def _json(value: Any) -> Any:
    """What JSON holds of a value: NaN is null."""
    if isinstance(value, Mapping):
        return {key: _json(x) for key, x in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
