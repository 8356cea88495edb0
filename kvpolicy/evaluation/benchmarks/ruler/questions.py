"""RULER's two question-answering tasks, from files that a user has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs

from ..item import Item


@attrs.frozen
class Asked:
    """A question, its answers and the passages that it needs."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


def squad(file: Path) -> list[Asked]:
    """The answerable questions of a file in SQuAD's form (`data`, `paragraphs`, `qas`)."""
    found = []
    for article in _json(file)["data"]:
        for paragraph in article["paragraphs"]:
            for one in paragraph["qas"]:
                answers = tuple(dict.fromkeys(x["text"] for x in one["answers"]))
                if answers and not one.get("is_impossible"):
                    found.append(Asked(one["question"], answers, (paragraph["context"],)))
    return found


def hotpot(file: Path) -> list[Asked]:
    """The questions of a file in HotpotQA's form (`question`, `answer`, `context`)."""
    return [
        Asked(
            one["question"],
            (one["answer"],),
            tuple(f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]),
        )
        for one in _json(file)
    ]


#: What reads the file of a task.
QUESTIONS = {"qa_1": squad, "qa_2": hotpot}


def answered(data: Sequence[Path]) -> dict[str, Path]:
    """The tasks that a user's JSON files, or those in folders, serve, by their form."""
    files = [y for x in data for y in (sorted(x.glob("*.json")) if x.is_dir() else [x])]
    found: dict[str, Path] = {}
    for file in files:
        task = "qa_1" if isinstance(_json(file), dict) else "qa_2"
        if task in found:
            raise ValueError(f"data: wanted one file for {task}, got {found[task]} and {file}")
        found[task] = file
    return found


def asking(task: str, asked: Sequence[Asked], seed: int) -> Callable[[int], list[Item]]:
    """Questions of `qa_1` or `qa_2`: a question's passages among those of others.

    As many as fit; a file with few passages makes contexts that are shorter.
    """
    one = asked[random.Random(seed).randrange(len(asked))]
    others = list(dict.fromkeys(p for x in asked for p in x.passages if p not in one.passages))
    order = random.Random(seed + 1).sample(range(len(others)), len(others))

    def make(units: int) -> list[Item]:
        passages = [*one.passages, *(others[i] for i in order[:units])]
        random.Random(seed + 2).shuffle(passages)
        named = "\n\n".join(f"Document {i}:\n{p}" for i, p in enumerate(passages, 1))
        return [
            Item(
                task=task,
                context=f"Answer a question from the documents below.\n\n{named}",
                question=f"Give the answer alone. Question: {one.question}",
                lead="Answer:",
                answers=one.answers,
                new_tokens=32,
            )
        ]

    return make


@lru_cache(maxsize=4)
def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data: {file}: wanted JSON, got {error}") from error
