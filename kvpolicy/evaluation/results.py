"""Results of an evaluation: one line of JSON a cell, tables, claims and plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from .grid import FULL, LOSS
from .score import Estimate

Row = dict[str, Any]


@attrs.frozen
class Store:
    """A folder of results that a later run goes on with."""

    folder: Path = attrs.field(converter=Path)

    def open(self, settings: Row, made_with: Row) -> list[Row]:
        """The rows of earlier runs with the same settings.

        `made_with` says what this run uses; runs with several are all recorded.

        Raises:
            ValueError: the folder holds results of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        record: Row = {"settings": settings, "made_with": []}
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            found = record["settings"]
            other = [name for name in settings if found.get(name) != settings[name]]
            if other:
                raise ValueError(
                    f"out: {self.folder} holds results of another {', '.join(other)}: "
                    f"{', '.join(repr(found.get(name)) for name in other)}"
                )
        if made_with not in record["made_with"]:
            record["made_with"].append(made_with)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
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
        """Writes results.json and results.md."""
        from .claims import claims

        record = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        (self.folder / "results.json").write_text(
            json.dumps({**record, "cells": rows}, indent=1), encoding="utf-8"
        )
        said = [f"# {title}", "", *_record(record), *claims(rows), *tables(rows), _NOTE, ""]
        (self.folder / "results.md").write_text("\n".join(said), encoding="utf-8")

    @property
    def _cells(self) -> Path:
        return self.folder / "cells.jsonl"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over contexts and its standard error."""
    if not values:
        return Estimate(mean=math.nan, standard_error=math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(mean=statistics.fmean(values), standard_error=spread / math.sqrt(len(values)))


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """The quotient of two means over the same contexts, with the error of leaving one out."""
    count = len(values)
    if count != len(base) or not sum(base):
        return Estimate(mean=math.nan, standard_error=math.nan)
    total, below = sum(values), sum(base)
    left = [(total - a) / (below - b) for a, b in zip(values, base, strict=True) if below - b]
    error = math.nan
    if len(left) == count > 1:
        middle = statistics.fmean(left)
        error = math.sqrt((count - 1) / count * sum((x - middle) ** 2 for x in left))
    return Estimate(mean=total / below, standard_error=error)


def shown(values: Sequence[float]) -> str:
    """Mean and standard error, as far as there are any."""
    return said(estimate(values))


def said(found: Estimate) -> str:
    """An estimate, as far as there is one."""
    if math.isnan(found.standard_error):
        return "" if math.isnan(found.mean) else f"{found.mean:.3f}"
    return str(found)


def tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, one table a task and length."""
    out = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        here = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        scores = ("loss", "hit_loss") if task == LOSS else ("accuracy", "exact", "log_likelihood")
        full = next((row for row in here if row["variant"] == FULL and "skipped" not in row), {})
        names = ["composition", "cache", "read", "MB"]
        names += [*(score.replace("_", " ") for score in scores)]
        names += [f"{score.replace('_', ' ')} / full" for score in compared(task)] + ["n"]
        out += [f"## {task}, {length} tokens", "", line(names)]
        out.append(line(["---", *["---:"] * (len(names) - 1)]))
        for row in here:
            if "skipped" in row:
                out.append(line([row["variant"], row["skipped"], *[""] * (len(names) - 2)]))
                continue
            cells = [
                row["variant"],
                f"{row['held_tokens'] / row['seen_tokens']:.1%}",
                f"{row['read_tokens'] / row['seen_tokens']:.1%}",
                f"{row['bytes'] / 1e6:.2f}",
                *(shown(row[score]) for score in scores),
                *(said(ratio(row[score], full.get(score, []))) for score in compared(task)),
                str(len(row[scores[0]])),
            ]
            out.append(line(cells))
        out.append("")
    return out


def compared(task: str) -> tuple[str, ...]:
    """The scores that are set in relation to full attention's."""
    return ("loss", "hit_loss") if task == LOSS else ("accuracy",)


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _record(record: Row) -> list[str]:
    """What the results were made from and with."""
    pairs = [("", record["settings"]), *(("made with ", made) for made in record["made_with"])]
    lines = (what + ", ".join(f"{name} {x[name]}" for name in x) for what, x in pairs)
    return [*(f"{text}  " for text in lines), ""]


_NOTE = (
    "Cache: tokens held per head, local window included, of all tokens seen; read: those that the "
    "last token read. A gate's name in brackets: made to take as many bytes of keys and values as "
    "that gate on the same prompts. At a fraction: the selection reads, or the eviction leaves "
    "when the prompt ends, that part of the context's tokens per head. MB: all bytes of a "
    "sequence's cache. Means over n contexts ± their standard errors; / full: the quotient of "
    "means, its error by leaving one context out. SnapKV evicts when the prompt ends: before the "
    "question, or after it where the name says that it has seen it; numbers of the two kinds do "
    "not compare. All others answer alike either way."
)
