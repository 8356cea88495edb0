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
from .item import Item

Score = Callable[[str, Item], float]
Row = Mapping[str, Any]


def by_references(score: Callable[[str, Sequence[str]], float]) -> Score:
    """A score that asks for nothing but an item's references."""
    return lambda answer, item: score(answer, item.answers)


def _first_line(score: Score) -> Score:
    return lambda answer, item: score(answer.lstrip().split("\n")[0], item)


def _of_class(answer: str, item: Item) -> float:
    return scores.of_class(answer, item.answers, item.about["all_classes"])


_F1, _ROUGE = by_references(scores.word_f1), by_references(scores.rouge_l)
_CHARACTERS, _NUMBERS = by_references(scores.character_f1), by_references(scores.of_numbers)
_CODE, _LETTER = by_references(scores.edit_similarity), by_references(scores.letter)
_FIRST = by_references(scores.first_number)

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
    "passkey": _FIRST,
    "number_string": _FIRST,
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
    "shortdep_qa": _ROUGE,
    "longdep_qa": _ROUGE,
    "longdep_summarization": _ROUGE,
}


@attrs.frozen(kw_only=True)
class Published:
    """Where a benchmark lies on the hub, what its tasks are and how each is scored.

    A task is a configuration of the repository where `configs`, else a value of the column `task`.
    `left_out` are its tasks that are not served, with the reason.
    """

    repository: str
    tasks: Mapping[str, Score]
    split: str = "test"
    configs: bool = True
    left_out: Mapping[str, str] = attrs.field(factory=dict)

    def read(self, tasks: Sequence[str] | None = None, folder: Path | None = None) -> list[Item]:
        """The items of some tasks; all where none is named.

        `folder` holds `TASK.jsonl` files with the same columns, for machines without a network.

        Raises:
            ValueError: a task that it does not have, or that is left out.
            ModuleNotFoundError: `datasets` is missing.
        """
        names = list(self.tasks) if tasks is None else list(tasks)
        for name in names:
            if name in self.left_out:
                raise ValueError(f"task: {name} is left out: {self.left_out[name]}")
            if name not in self.tasks:
                raise ValueError(f"task: wanted one of {', '.join(self.tasks)}, got {name!r}")
        return [item for name in names for item in items(self._rows(name, folder), name)]

    def _rows(self, task: str, folder: Path | None) -> Iterable[Row]:
        if folder is not None:
            from .own import rows

            return rows(folder / f"{task}.jsonl")
        with extra("benchmarks"):
            import datasets
        if self.configs:
            return datasets.load_dataset(self.repository, task, split=self.split)
        whole = datasets.load_dataset(self.repository, split=self.split)
        return whole.filter(lambda row: row.get("task", task) == task)

    def score(self, answer: str, item: Item) -> float:
        """An answer's score in [0, 1]."""
        return self.tasks[item.task](answer, item)


def items(rows: Iterable[Row], task: str) -> list[Item]:
    """Items of a benchmark's rows; ValueError names the row and the column that is missing."""
    found = []
    for number, row in enumerate(rows):
        answers = row.get("answers", row.get("answer"))
        for column, value in (("context", row.get("context")), ("question", row.get("question")),
                              ("answer", answers)):  # fmt: skip
            if value is None:
                raise ValueError(f"{task}, row {number}: wanted the column {column!r}, got none")
        about = {k: row[k] for k in ("all_classes", "length", "difficulty") if k in row}
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
        tasks=LONGBENCH,
        left_out=dict.fromkeys(
            ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"),
            "its score cuts Chinese text into words by a segmenter",
        ),
    ),
    "longbench-v2": Published(
        repository="Xnhyacinth/LongBench-v2", tasks={"0shot": _LETTER, "cot": _LETTER}
    ),
    "infinitebench": Published(
        repository="MaxJeblick/InfiniteBench",
        tasks=INFINITEBENCH,
        left_out={"longbook_sum_eng": "its summaries are scored by another model"},
    ),
    "loogle": Published(repository="simonjegou/loogle", tasks=LOOGLE),
    "aime25": _ONE(repository="alessiodevoto/aime25", tasks={"aime25": _FORMULA}),
    "math500": _ONE(repository="alessiodevoto/math500", tasks={"math500": _FORMULA}),
}
