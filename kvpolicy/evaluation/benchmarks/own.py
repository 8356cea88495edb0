"""Questions of a user's own, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .item import Item

_COLUMNS = {"context": str, "question": str, "answer": (str, list)}


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, empty lines left out; ValueError names the line that is none."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file.name}, line {number}: no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file.name}, line {number}: wanted an object, got {line[:40]}")
        yield found


def own_items(file: Path) -> list[Item]:
    """Items of a file with `context`, `question` and `answer` (a text or several) on each line.

    `task`, `answer_prefix` and `max_new_tokens` may stand beside them.

    Raises:
        ValueError: a line that is no object, lacks a column or has another kind of value in it.
    """
    found = []
    for number, row in enumerate(rows(file), 1):
        for name, kind in _COLUMNS.items():
            if not isinstance(row.get(name), kind) or not row[name] and name == "answer":
                raise ValueError(
                    f"{file.name}, object {number}: wanted {name!r} as a text"
                    f"{' or a list of texts' if name == 'answer' else ''}, got {row.get(name)!r}"
                )
        found.append(
            Item(
                task=str(row.get("task", file.stem)),
                context=row["context"],
                question=row["question"],
                answers=row["answer"],
                lead=str(row.get("answer_prefix", "")),
                new_tokens=int(row.get("max_new_tokens", 64)),
            )
        )
    if not found:
        raise ValueError(f"{file.name}: wanted one question or more, got none")
    return found
