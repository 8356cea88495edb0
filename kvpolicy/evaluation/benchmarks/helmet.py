"""HELMET from its released jsonl files: the parts whose score needs no other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from . import scores
from .benchmark import Benchmark, Wanted, some
from .item import Item
from .own import rows

_JUDGED = {
    "narrativeqa": "its answers are judged by a model",
    "infbench_sum": "its summaries are judged by a model",
    "multi_lexsum": "its summaries are judged by a model",
    "asqa": "its citations are checked by a model",
    "qampari": "its citations are checked by a model",
}
_SHOTS = 2  # of key-value files, as the authors' configurations have


@attrs.frozen
class Helmet(Benchmark):
    """A task is a file's name; what kind it is, its columns say.

    `ctxs` with relevance labels are ranked (NDCG@10), other `ctxs` are passages for a question (a
    reference is part of the answer); files whose name begins with "icl" hold labelled examples (the
    label alone); `outputs` are RULER's (the part of them that is found); else `context`, `question`
    and `answer` are recall (a reference is part of the answer). Demonstrations of other files are
    left out.
    """

    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        return tuple(x for x in _files(data) if not self.refused(x))

    def refused(self, task: str) -> str:
        return next((why for name, why in _JUDGED.items() if name in task.lower()), "")

    def items(self, task: str, wanted: Wanted) -> list[Item]:
        file = _files(wanted.data)[task]
        found = [
            _item(task, row, f"{file.name}, object {n}") for n, row in enumerate(rows(file), 1)
        ]
        return some(found, wanted)

    def score(self, answer: str, item: Item) -> float:
        found: float = item.about["score"](answer, item.answers)
        return found


def _files(data: Sequence[Path]) -> dict[str, Path]:
    files = [y for x in data for y in (sorted(x.rglob("*.jsonl")) if x.is_dir() else [x])]
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise ValueError(
                f"data: wanted files of different names, got {found[file.stem]}, {file}"
            )
        found[file.stem] = file
    return found


def _item(task: str, row: Mapping[str, Any], place: str) -> Item:
    try:
        return _kind(task, row)(task, row)
    except KeyError as error:
        raise ValueError(f"{place}: wanted the column {error}, got {', '.join(row)}") from error


def _kind(task: str, row: Mapping[str, Any]) -> Any:
    if "ctxs" in row:
        return _ranked if all("label" in x for x in row["ctxs"]) else _passages
    if task.lower().startswith("icl"):
        return _labelled
    return _ruler if "outputs" in row or "type_needle_v" in row else _recall


def _passages(task: str, row: Mapping[str, Any]) -> Item:
    given = "\n\n".join(f"Document (Title: {x['title']}): {x['text']}" for x in row["ctxs"])
    return Item(
        task=task,
        context=f"Answer a question shortly, from the documents below.\n\n{given}",
        question=f"Question: {row['question']}",
        lead="Answer:",
        answers=row["answers"],
        new_tokens=20,
        about={"score": scores.contains},
    )


def _ranked(task: str, row: Mapping[str, Any]) -> Item:
    def said(x: Mapping[str, Any]) -> str:
        title = f" (Title: {x['title']})" if "title" in x else ""
        return f"[ID: {x['id']}] Document{title}: {x['text']}"

    given = "\n\n".join(map(said, row["ctxs"]))
    return Item(
        task=task,
        context="Rank the documents below by how much they help with a query, the most helpful "
        f"first. Name the IDs of all, as in: Ranking: ID3 > ID1 > ID2\n\n{given}",
        question=f"Query: {row['query']}",
        lead="Ranking:",
        answers=tuple(f"{x['id']} {x['label']}" for x in row["ctxs"]),
        new_tokens=200,
        about={"score": scores.ndcg_at_10},
    )


def _labelled(task: str, row: Mapping[str, Any]) -> Item:
    return Item(
        task=task,
        context='Give a text its label, as the examples below do. Write "label: " and the label '
        f"alone.\n\n{row['context']}",
        question=row["question"],
        lead="label:",
        answers=row["answer"],
        new_tokens=20,
        about={"score": scores.labelled},
    )


def _ruler(task: str, row: Mapping[str, Any]) -> Item:
    asked = row.get("query") or row["question"]
    kind = row.get("type_needle_v")
    question = asked if kind is None else f"What are all the special magic {kind} for {asked}?"
    return Item(
        task=task,
        context=row["context"],
        question=question,
        lead="Answer:" if kind is None else f"The special magic {kind} for {asked} are",
        answers=row["answer"] if "answer" in row else row["outputs"],
        new_tokens=50,
        about={"score": scores.all_found},
    )


def _recall(task: str, row: Mapping[str, Any]) -> Item:
    shown = [f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in row.get("demos", ())[:_SHOTS]]
    return Item(
        task=task,
        context=row["context"],
        question="Give the value of a key in the JSON object above.\n\n"
        f"{''.join(shown)}Key: {row['question']}",
        lead="Corresponding value:",
        answers=row["answer"],
        new_tokens=100,
        about={"score": scores.contains},
    )
