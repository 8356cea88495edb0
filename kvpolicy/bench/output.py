"""Results as JSON, as a Markdown table, as plots and as a compact table on the terminal."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import torch

from .._files import write_text
from .._markdown import table
from .context import Bench
from .rows import Row


def machine(bench: Bench) -> dict[str, Any]:
    """Where the numbers come from."""
    cuda = bench.device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": bench.quick,
        "copy_bytes_per_s": bench.copy_rate,
        "bf16_flop_per_s": bench.flop_rate,
    }
    for name in ("triton", "transformers"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.import_module(name).__version__
    for name in ("fa3-fwd", "flashinfer-python"):  # baselines
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_results(out: Path, bench: Bench, rows: list[Row]) -> None:
    """Writes `results.json` and `results.md`."""
    out.mkdir(parents=True, exist_ok=True)
    about = machine(bench)
    text = json.dumps({"machine": about, "rows": [row.as_dict() for row in rows]}, indent=1)
    write_text(out / "results.json", text + "\n")
    write_text(out / "results.md", markdown(about, rows))


def number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.4g} {unit}".strip()


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """One table; goals with their verdicts."""
    heads = (
        "group", "benchmark", "shape", "measured", "rate", "floor", "target: found", "same run",
        "how",
    )  # fmt: skip
    cells = (
        (
            row.group, row.name, row.shape, number(row.value, row.unit),
            number(row.rate, row.rate_unit), number(row.floor, row.unit),
            "; ".join(map(str, row.goals)), row.baseline, row.error or row.note,
        )
        for row in rows
    )  # fmt: skip
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join([said, "", *table(heads, cells)]) + "\n"


def print_table(rows: list[Row]) -> None:
    """At most 80 lines: name, measured, rate, floor, goals, comparison."""
    shown = rows if len(rows) <= 77 else [row for row in rows if row.goals or row.error][:77]
    cells = [("group", "benchmark", "measured", "rate", "floor")]
    cells += [
        (
            row.group, row.name, number(row.value, row.unit), number(row.rate, row.rate_unit),
            number(row.floor),
        )
        for row in shown
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rest = ["target: found; same run"]
    for row in shown:
        parts = [row.error] if row.error else [*map(str, row.goals), row.baseline]
        rest.append("; ".join(part for part in parts if part))
    for line, said in zip(cells, rest, strict=True):
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join((*padded, said))[:200].rstrip())
    verdicts = [goal.verdict for row in rows for goal in row.goals]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("met", "short", "missed"))
    print(f"goals: {counts}; rows without result: {sum(bool(row.error) for row in rows)}")
