"""The files of an evaluation: a line of JSON a cell, and what was made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

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

    def write(self, rows: Sequence[Row], text: str) -> None:
        """Writes the rows as results.json and `text` as results.md."""
        (self.folder / "results.json").write_text(
            json.dumps({**self.record(), "cells": rows}, indent=1), encoding="utf-8"
        )
        (self.folder / "results.md").write_text(text, encoding="utf-8")

    def record(self) -> Row:
        """The settings, and what the runs used."""
        found: Row = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        return found

    @property
    def _cells(self) -> Path:
        return self.folder / "cells.jsonl"
