"""Pictures of results: bars of every group, and curves of the end-to-end costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._extras import extra
from .model import FRACTION, SHAPES
from .rows import Row

UNITS = {"TTFT": "s", "TPOT": "ms"}


def draw(out: Path, rows: list[Row]) -> None:
    """Writes `group-unit.png` for each group and unit, and `model-over-what.png` for costs."""
    with extra("plots"):
        import matplotlib

    matplotlib.use("agg")
    for group in dict.fromkeys(row.group for row in rows if row.value is not None):
        for unit in dict.fromkeys(r.unit for r in rows if r.group == group and r.value is not None):
            mine = [r for r in rows if r.group == group and r.value is not None and r.unit == unit]
            _bars(out / f"{group}-{unit.split()[0]}.png", group, unit, mine)
    costs = [row for row in rows if row.value is not None and row.extra.get("what") in UNITS]
    for name, label, x, belongs in CURVES:
        _curves(out / f"model-over-{name}.png", label, x, [r for r in costs if belongs(r.extra)])


def _bars(path: Path, group: str, unit: str, rows: list[Row]) -> None:
    """Measured times with their floors."""
    with extra("plots"):
        import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 1 + 0.4 * len(rows)), layout="constrained")
    at = range(len(rows))
    axis.barh(at, [r.value or 0.0 for r in rows], color="tab:blue", label="measured")
    floors = [(y, r.floor) for y, r in zip(at, rows, strict=True) if r.floor]
    if floors:
        axis.plot([f for _, f in floors], [y for y, _ in floors], "k|", ms=12, label="floor")
    axis.set_yticks(at, [r.name for r in rows])
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(group)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(path: Path, label: str, x: Callable[[Any], float], rows: list[Row]) -> None:
    """A panel for each cost: measured points, and a line of what operations and bytes predict."""
    with extra("plots"):
        import matplotlib.pyplot as plt

    costs = [what for what in UNITS if any(r.extra["what"] == what for r in rows)]
    if not costs:
        return
    figure, axes = plt.subplots(
        1, len(costs), figsize=(5.5 * len(costs), 4), layout="constrained", squeeze=False
    )
    for axis, what in zip(axes[0], costs, strict=True):
        mine = [row for row in rows if row.extra["what"] == what]
        for number, series in enumerate(sorted({_series(row.extra) for row in mine})):
            points = sorted(
                (x(r.extra), r.value, r.floor) for r in mine if _series(r.extra) == series
            )
            at, values, floors = zip(*points, strict=True)
            color = f"C{number}"
            axis.plot(at, values, "o", color=color, label=series)
            axis.plot(at, floors, "-", color=color, lw=1, marker="_")
        axis.plot([], [], "k-", lw=1, label="floor")
        axis.set_xlabel(label)
        axis.set_ylabel(f"{what} [{UNITS[what]}]")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _series(extra: Any) -> str:
    return f"{extra['shape']}, {extra['policy']}"


def _admitted(extra: Any) -> float:
    return 1.0 if extra["policy"] == "dense" else extra["fraction"]


# What, axis label, place on the axis, and which settings belong to the picture.
CURVES: tuple[tuple[str, str, Callable[[Any], float], Callable[[Any], bool]], ...] = (
    (
        "context", "context [1000 tokens]", lambda e: e["tokens"] / 1e3,
        lambda e: e["batch"] == 1 and e["fraction"] == FRACTION,
    ),
    (
        "fraction", "admitted fraction at 100K", _admitted,
        lambda e: e["batch"] == 1 and e["tokens"] == 100_000 and e["shape"] == SHAPES[0]
        and e["policy"] in ("gate", "dense"),
    ),
    ("batch", "batch at 32K", lambda e: e["batch"], lambda e: e["tokens"] == 32_000),
    (
        "stored", "stored tokens, over all heads [millions]", lambda e: e["stored"] / 1e6,
        lambda e: e["what"] == "TPOT",
    ),
)  # fmt: skip
