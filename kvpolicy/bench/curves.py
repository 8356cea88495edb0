"""Curves of end-to-end costs: measurements joined by lines, with their floors behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from .._pictures import DPI, INK, Look, axes_of, curve, legend, looks, new_figure
from .model import FRACTION, SHAPES
from .rows import Row

MEMORY = "memory"
#: Costs in the order of panels: title and unit.
PANELS = {
    "TTFT": ("time to first token", "s"),
    "TPOT": ("time per output token", "ms"),
    MEMORY: ("cache in memory", "GB"),
}
LABELS = {"dense": "dense: all admitted", "gate": "write gate"}
FLOOR = "floor: what operations\nand bytes need at least"
_FLOOR: dict[str, Any] = {"alpha": 0.42, "linewidth": 1.4, "marker": "_", "markersize": 7}
NOTE = "Random weights, compiled layers. A bar spans a setting that was measured again."


@attrs.frozen(kw_only=True)
class Cost:
    """A cost of a setting (the fields of `Setting`, and its stored tokens).

    `values` are all measurements, the newest last.
    """

    what: str
    setting: dict[str, Any]
    values: tuple[float, ...]
    floor: float | None

    @property
    def value(self) -> float:
        return self.values[-1]


def costs(rows: Sequence[Row]) -> list[Cost]:
    """Costs in the rows of one or several runs; a setting that was measured again is one cost."""
    settings = settings_of(rows)
    found: dict[tuple[str, str], Cost] = {}
    for row in rows:
        name, what = setting_name(row), row.name.rpartition(": ")[2]
        what = row.extra.get("what", what if row.group == "model" else "")
        if row.value is None or what not in PANELS or name not in settings:
            continue
        before = found.pop((name, what), None)
        values = (*before.values, row.value) if before else (row.value,)
        found[name, what] = Cost(what=what, setting=settings[name], values=values, floor=row.floor)
    return list(found.values())


def settings_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Fields of each setting, by its name: rows of memory and launches have the name alone."""
    return {setting_name(row): row.extra for row in rows if row.extra.get("what")}


def setting_name(row: Row) -> str:
    """The part of a row's name before what was measured."""
    return row.name.rpartition(": ")[0]


def draw_curves(out: Path, rows: Sequence[Row], where: str) -> None:
    """Writes `model-memory-and-time.png` and `model-over-what.png`, as far as there are rows."""
    found = costs(rows)
    short = f" on {where}" if where else ""
    share = f"{100 * FRACTION:.0f} % admitted"
    single = [c for c in found if c.setting["batch"] == 1]
    usual = [c for c in single if c.setting["fraction"] == FRACTION]
    first = [c for c in usual if c.setting["shape"] == SHAPES[0]]
    context = "context [1000 tokens]", lambda s: s["tokens"] / 1e3
    _picture(
        out / "model-memory-and-time.png",
        f"{SHAPES[0]}'s shape{short}:\ntime and memory over context, {share}",
        *context, first, square=True,
    )  # fmt: skip
    _picture(
        out / "model-over-context.png", f"Time and memory over context{short}, {share}",
        *context, usual,
    )  # fmt: skip
    _picture(
        out / "model-over-fraction.png",
        f"{SHAPES[0]}'s shape{short}, 100K tokens: time and memory over the admitted fraction",
        "admitted fraction",
        lambda s: 1.0 if s["policy"] == "dense" else s["fraction"],
        [
            c for c in single
            if c.setting["tokens"] == 100_000 and c.setting["shape"] == SHAPES[0]
            and c.setting["policy"] in LABELS
        ],
    )  # fmt: skip
    _picture(
        out / "model-over-batch.png",
        f"Sequences of 32K tokens{short}: time and memory over the batch, {share}",
        "sequences",
        lambda s: s["batch"],
        [c for c in found if c.setting["tokens"] == 32_000 and c.setting["fraction"] == FRACTION],
    )
    _picture(
        out / "model-over-stored.png",
        f"Time per output token over stored tokens{short}",
        "stored tokens, over all heads [millions]",
        lambda s: s["stored"] / 1e6,
        [c for c in found if c.what == "TPOT"],
        across=True,
    )


def _picture(
    path: Path,
    title: str,
    label: str,
    x: Callable[[dict[str, Any]], float],
    mine: Sequence[Cost],
    across: bool = False,
    square: bool = False,
) -> None:
    """A row of panels a shape and a panel a cost, or `across` a panel a shape.

    `square` has two panels a row and the legend in the last place, to be read on a phone too.
    """
    if not mine:
        return
    shapes = [shape for shape in SHAPES if any(c.setting["shape"] == shape for c in mine)]
    kinds = [what for what in PANELS if any(c.what == what for c in mine)]
    places = [(s, k) for s in shapes for k in kinds]
    rows, columns = (1, len(places)) if across else (len(shapes), len(kinds))
    square = square and len(places) == 3
    if square:
        figure = new_figure(5.4, 5.4, title, NOTE.replace(". ", ".\n"))
        panels = axes_of(figure, 2, 2)
    else:
        figure = new_figure(max(4.1 * columns, 8.2), 3.1 * rows + 1.6, title, NOTE)
        panels = axes_of(figure, rows, columns, sharey="row" if across else "col")
    used = panels.flat[: len(places)]
    named = looks(c.setting["policy"] for c in mine)
    for (shape, what), axes in zip(places, used, strict=True):
        here = [c for c in mine if (c.setting["shape"], c.what) == (shape, what)]
        _panel(axes, here, x, named)
        says, unit = PANELS[what]
        both = f"{shape}: {says}" if len(shapes) > 1 else says
        axes.set_title(both, color=INK, fontsize=11)
        axes.set_xlabel(label, color=INK, fontsize=9.5)
        axes.set_ylabel(unit, color=INK, fontsize=9.5)
        axes.yaxis.set_tick_params(labelleft=True)
    # After all panels of a shared axis have their data.
    for axes in used:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    legend(figure, used, FLOOR, panels.flat[-1] if square else None)
    figure.savefig(path, dpi=DPI * 5 // 4 if square else DPI)


def _panel(
    axes: Any, here: Sequence[Cost], x: Callable[[dict[str, Any]], float], named: dict[str, Look]
) -> None:
    """A line a policy; batches are a line of their own where contexts differ too."""
    for policy, look in named.items():
        of = [c for c in here if c.setting["policy"] == policy]
        contexts = len({c.setting["tokens"] for c in of}) > 1
        for batched in (False, True):
            line = [c for c in of if (contexts and c.setting["batch"] > 1) == batched]
            line.sort(key=lambda c: x(c.setting))
            if not line:
                continue
            at = [x(c.setting) for c in line]
            floors = [(a, c.floor) for a, c in zip(at, line, strict=True) if c.floor is not None]
            if floors:
                axes.plot(*zip(*floors, strict=True), color=look.colour, **_FLOOR)
            name = LABELS.get(policy, policy) + (", in batches" if batched else "")
            values = [c.value for c in line]
            below = [c.value - min(c.values) for c in line]
            above = [max(c.values) - c.value for c in line]
            curve(axes, at, values, below, above, look, name, dashed=batched)
    axes.plot([], [], color=INK, label=FLOOR, **_FLOOR)
