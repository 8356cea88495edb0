"""Pictures of results: bars of every group, and curves of the end-to-end costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._extras import extra
from .._pictures import DPI, INK, NEUTRAL, PAPER, axes_of, legend, looks, new_figure
from .curves import FLOOR, draw_curves, setting_name, settings_of
from .rows import Row


def draw(out: Path, rows: Sequence[Row], where: str = "") -> None:
    """Writes `group-unit.png` for each group and unit, and the curves of end-to-end costs.

    `where` is the device that they were measured on.
    """
    with extra("plots"):
        import matplotlib  # noqa: F401

    settings = settings_of(rows)
    for group in dict.fromkeys(row.group for row in rows if row.value is not None):
        for unit in dict.fromkeys(r.unit for r in rows if r.group == group and r.value is not None):
            mine = [r for r in rows if r.group == group and r.value is not None and r.unit == unit]
            _bars(out / f"{group}-{unit.split()[0]}.png", group, unit, mine, settings, where)
    draw_curves(out, rows, where)


def read_rows(files: Sequence[Path]) -> tuple[list[Row], str]:
    """Rows of several `results.json`, those of later files last, and the device.

    Raises:
        ValueError: the files are of several devices.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    devices = sorted({part["machine"]["device"] for part in found})
    if len(devices) != 1:
        raise ValueError(f"files: wanted results of one device, got {', '.join(devices) or 'none'}")
    # Goals are for tables.
    rows = [Row(**{**row, "goals": ()}) for part in found for row in part["rows"]]
    return rows, devices[0]


def _bars(
    path: Path,
    group: str,
    unit: str,
    rows: Sequence[Row],
    settings: dict[str, dict[str, Any]],
    where: str,
) -> None:
    """Measurements with their floors; a name is a bar, measured again or not."""
    title = f"{group} [{unit}]" + (f" on {where}" if where else "")
    newest = {row.name: row for row in rows}
    names = list(newest)
    height = 1.5 + 0.32 * len(names)
    figure = new_figure(3.5 + 0.075 * max(map(len, names)) + 3.5, height, title)
    ((axes,),) = axes_of(figure, 1, 1)
    named = looks(x["policy"] for x in settings.values())
    for y, row in enumerate(newest.values()):
        setting = settings.get(setting_name(row))
        colour = named[setting["policy"]].colour if setting else NEUTRAL
        axes.barh(y, row.value or 0.0, color=colour, height=0.7)
        end = max(row.value or 0.0, row.floor or 0.0)
        axes.text(end, y, f"  {row.value:.4g}", va="center", color=INK, fontsize=8.5)
    floors = [(row.floor, y) for y, row in enumerate(newest.values()) if row.floor]
    if floors:
        for colour, width, label in ((PAPER, 4.5, None), (INK, 1.6, FLOOR)):
            axes.plot(
                *zip(*floors, strict=True), "|", color=colour, markersize=11,
                markeredgewidth=width, label=label,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit, color=INK, fontsize=9.5)
    legend(figure, [axes])
    figure.savefig(path, dpi=DPI)
