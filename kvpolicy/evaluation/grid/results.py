"""The files of an evaluation: a line of JSON a cell, and what was made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from ..._files import write_text
from .records import Result, from_json, to_json

#: Of the files; 1 is version 0.1.0's, which told failed cells from skipped ones by the reason only.
FORMAT = 2
Record = dict[str, Any]


@attrs.frozen
class Store:
    """A folder of results that a later run goes on with."""

    folder: Path = attrs.field(converter=Path)

    def open(self, settings: Record, made_with: Record) -> list[Result]:
        """The results of earlier runs with the same settings, the last of each cell.

        `made_with` says what this run uses; runs with several are all recorded.

        Raises:
            ValueError: the folder holds results of other settings or of a newer version, or a file
                is damaged. Nothing is written then.
        """
        path = self.folder / "settings.json"
        record: Record = {"format": FORMAT, "settings": settings, "made_with": []}
        if path.exists():
            record = self.record()
            found = record["settings"]
            other = [name for name in settings if found.get(name) != settings[name]]
            if other:
                raise ValueError(
                    f"out: {self.folder} holds results of another {', '.join(other)}: "
                    f"{', '.join(repr(found.get(name)) for name in other)}"
                )
        text = self._cells.read_text(encoding="utf-8") if self._cells.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # an interrupted run leaves half a line
        results = self._results(whole)
        self.folder.mkdir(parents=True, exist_ok=True)
        if made_with not in record["made_with"]:
            record["made_with"].append(made_with)
        write_text(path, json.dumps({**record, "format": FORMAT}, indent=1))
        if whole != text:
            write_text(self._cells, whole)
        return results

    def read(self) -> list[Result]:
        """The results that the folder holds, the last of each cell; nothing is written."""
        text = self._cells.read_text(encoding="utf-8") if self._cells.exists() else ""
        return self._results(text[: text.rfind("\n") + 1])

    def add(self, result: Result) -> None:
        """Appends the result of a finished cell."""
        with self._cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(result)) + "\n")

    def record(self) -> Record:
        """The settings, and what the runs used.

        Raises:
            ValueError: the file is damaged or of a newer version.
        """
        path = self.folder / "settings.json"
        found = _json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(found, dict):
            raise ValueError(f"{path}: wanted an object, got {type(found).__name__}")
        if found.get("format", 1) not in (1, FORMAT):
            raise ValueError(
                f"{path}: wanted format 1 or {FORMAT}, got {found['format']!r}; results of another "
                "version of kvpolicy go to a folder of their own"
            )
        for name, kind in (("settings", dict), ("made_with", list)):
            if not isinstance(found.get(name), kind):
                raise ValueError(f"{path}: {name}: wanted a {kind.__name__}, got no such field")
        return found

    def _results(self, text: str) -> list[Result]:
        """The results of whole lines; one that failed gives way to a later one."""
        found: dict[tuple[str, int, str], Result] = {}
        for number, line in enumerate(text.split("\n")[:-1], 1):
            place = f"{self._cells} line {number}"
            value = _json(line, place)
            try:
                result = from_json(value)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if result.key in found and not found.pop(result.key).failed:
                task, length, variant = result.key
                raise ValueError(
                    f"{place}: {task}, {length}: {variant} stands in an earlier line too; delete "
                    "one of them"
                )
            found[result.key] = result
        return list(found.values())

    @property
    def _cells(self) -> Path:
        return self.folder / "cells.jsonl"


def write_results(folder: Path, record: Record, results: Iterable[Result], text: str) -> None:
    """Writes results with their record as results.json, and `text` as results.md."""
    cells = [to_json(result) for result in results]
    write_text(folder / "results.json", json.dumps({**record, "cells": cells}, indent=1))
    write_text(folder / "results.md", text)


def _json(text: str, place: str) -> Any:
    """Parsed JSON.

    Raises:
        ValueError: it is none; `place` says where it stands.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: wanted JSON, got {text[:40]!r}: {error}") from error
