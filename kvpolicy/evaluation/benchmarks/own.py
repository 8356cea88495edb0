"""Questions of a user's own, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from . import scores
from .benchmark import Benchmark, Wanted, some
from .item import Item

_COLUMNS: dict[str, type | tuple[type, ...]] = {
    "context": str,
    "question": str,
    "answer": (str, list),
}


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, empty lines left out; ValueError names the line that is none."""
    return (row for _, row in _numbered(file))


def own_items(file: Path) -> list[Item]:
    """Items of a file with `context`, `question` and `answer` (a text or several) on each line.

    `task`, `answer_prefix` and `max_new_tokens` may stand beside them.

    Raises:
        ValueError: a line that is no object, lacks a column or has another kind of value in it.
    """
    found = []
    for number, row in _numbered(file):
        place = f"{file.name}, line {number}"
        for name, kind in _COLUMNS.items():
            if not isinstance(row.get(name), kind) or (name == "answer" and not row[name]):
                also = " or a list of texts" if name == "answer" else ""
                raise ValueError(f"{place}: wanted {name!r} as a text{also}, got {row.get(name)!r}")
        new = row.get("max_new_tokens", 64)
        if not isinstance(new, int) or isinstance(new, bool) or new < 1:
            raise ValueError(
                f"{place}: wanted 'max_new_tokens' as a whole number from 1 on, got {new!r}"
            )
        found.append(
            Item(
                task=str(row.get("task", file.stem)),
                context=row["context"],
                question=row["question"],
                answers=row["answer"],
                lead=str(row.get("answer_prefix", "")),
                new_tokens=new,
            )
        )
    if not found:
        raise ValueError(f"{file.name}: wanted one question or more, got none")
    return found


@attrs.frozen
class Own(Benchmark):
    """A user's file; an answer is right that contains a reference, both normalized as in SQuAD."""

    file: Path

    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.task for item in own_items(self.file)))

    def items(self, task: str, wanted: Wanted) -> list[Item]:
        return some([x for x in own_items(self.file) if x.task == task], wanted)

    def score(self, answer: str, item: Item) -> float:
        return scores.contains(answer, item.answers)


def _numbered(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: JSON's texts may hold other line separators as they are.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file.name}, line {number}: no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file.name}, line {number}: wanted an object, got {line[:40]}")
        yield number, found
