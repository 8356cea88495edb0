"""Published benchmarks, read by `datasets` in the columns that they are shared in.

One row a question: `context`, `question`, `answer_prefix`, `answer` or `answers`, `task` and
`max_new_tokens`, as NVIDIA's kvpress reads them too, so that scores compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from ..._extras import extra
from . import scores
from .benchmark import Benchmark, Wanted, some
from .item import Item
from .own import rows

Score = Callable[[str, Item], float]
Row = Mapping[str, Any]


def by_references(score: Callable[[str, Sequence[str]], float]) -> Score:
    """A score that asks for nothing but an item's references."""
    return lambda answer, item: score(answer, item.answers)


def _first_line(score: Score) -> Score:
    return lambda answer, item: score(answer.lstrip("\n").split("\n")[0], item)


def _of_class(answer: str, item: Item) -> float:
    return scores.of_class(answer, item.answers, item.about["all_classes"])


_F1, _ROUGE = by_references(scores.word_f1), by_references(scores.rouge_f1)
_CHARACTERS, _NUMBERS = by_references(scores.character_f1), by_references(scores.of_numbers)
_CODE, _LETTER = by_references(scores.edit_similarity), by_references(scores.choice)
_DIGITS, _FIRST = by_references(scores.first_digits), by_references(scores.first_number)
_RECALL, _STATED = by_references(scores.rouge_recall), by_references(scores.stated)

LONGBENCH: dict[str, Score] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa"), _F1),
    **dict.fromkeys(("2wikimqa", "musique"), _F1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), _ROUGE),
    "trec": _first_line(_of_class),
    "triviaqa": _first_line(_F1),
    "samsum": _first_line(_ROUGE),
    "passage_count": _NUMBERS,
    "passage_retrieval_en": _NUMBERS,
    "lcc": _CODE,
    "repobench-p": _CODE,
}
INFINITEBENCH: dict[str, Score] = {
    "passkey": _DIGITS,
    "number_string": _DIGITS,
    "kv_retrieval": by_references(scores.word_found),
    "longdialogue_qa_eng": by_references(scores.any_found),
    "longbook_qa_eng": _F1,
    "longbook_qa_chn": _CHARACTERS,
    "longbook_choice_eng": _LETTER,
    "code_debug": _LETTER,
    "code_run": by_references(scores.last_number),
    "math_find": _FIRST,
    "math_calc": by_references(scores.leading_numbers),
}
LOOGLE: dict[str, Score] = {
    "shortdep_cloze": by_references(scores.masks_filled),
    "shortdep_qa": _RECALL,
    "longdep_qa": _RECALL,
    "longdep_summarization": _RECALL,
}


@attrs.frozen(kw_only=True)
class Published(Benchmark):
    """Where a benchmark lies on the hub, what its tasks are and how each is scored.

    A task is a configuration of the repository where `configs`, else all of it. `left_out` are
    tasks that are not served, with the reason. Folders among a user's files may hold `TASK.jsonl`
    with the same columns, for machines without a network.
    """

    repository: str
    answers: Mapping[str, Score]
    split: str = "test"
    configs: bool = True
    left_out: Mapping[str, str] = attrs.field(factory=dict)

    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        found = tuple(x for x in self.answers if _file(x, data))
        if data and not found:
            names = ", ".join(f"{x}.jsonl" for x in self.answers)
            raise ValueError(f"data: wanted a folder with one of {names}, found none of them")
        return found or tuple(self.answers)

    def refused(self, task: str) -> str:
        return self.left_out.get(task, "")

    def items(self, task: str, wanted: Wanted) -> list[Item]:
        file = _file(task, wanted.data)
        return some(items(self._hub(task) if file is None else rows(file), task), wanted)

    def score(self, answer: str, item: Item) -> float:
        return self.answers[item.task](answer, item)

    def _hub(self, task: str) -> Iterable[Row]:
        with extra("benchmarks"):
            import datasets
        named = (task,) if self.configs else ()
        found: Iterable[Row] = datasets.load_dataset(self.repository, *named, split=self.split)
        return found


def _file(task: str, data: Sequence[Path]) -> Path | None:
    """A user's file of a task."""
    places = (x / f"{task}.jsonl" if x.is_dir() else x for x in data)
    return next((x for x in places if x.name == f"{task}.jsonl" and x.is_file()), None)


def items(found_rows: Iterable[Row], task: str) -> list[Item]:
    """Items of a benchmark's rows; ValueError names the row and the column that is missing."""
    found = []
    for number, row in enumerate(found_rows):
        answers = row.get("answers")
        answers = row.get("answer") if answers is None else answers
        for column, value in (("context", row.get("context")), ("question", row.get("question")),
                              ("answer", answers)):  # fmt: skip
            if value is None:
                raise ValueError(f"{task}, row {number}: wanted the column {column!r}, got none")
        about = {k: row[k] for k in ("all_classes",) if k in row}
        found.append(
            Item(
                task=task,
                context=row["context"],
                question=row["question"],
                answers=answers,
                lead=row.get("answer_prefix") or "",
                new_tokens=int(row.get("max_new_tokens") or 64),
                about=about,
            )
        )
    return found


_ONE: Callable[..., Published] = partial(Published, configs=False)
_FORMULA = by_references(scores.mathematical)

#: Benchmarks by the names that people know them by.
PUBLISHED: dict[str, Published] = {
    "longbench": Published(
        repository="Xnhyacinth/LongBench",
        answers=LONGBENCH,
        left_out=dict.fromkeys(
            ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"),
            "its score cuts Chinese text into words by a segmenter",
        ),
    ),
    "longbench-v2": Published(repository="simonjegou/LongBench-v2", answers={"0shot": _STATED}),
    "infinitebench": Published(
        repository="MaxJeblick/InfiniteBench",
        answers=INFINITEBENCH,
        left_out={"longbook_sum_eng": "its summaries are scored by another model"},
    ),
    "loogle": Published(repository="simonjegou/loogle", answers=LOOGLE),
    "aime25": _ONE(repository="alessiodevoto/aime25", answers={"aime25": _FORMULA}),
    "math500": _ONE(repository="alessiodevoto/math500", answers={"math500": _FORMULA}),
}
