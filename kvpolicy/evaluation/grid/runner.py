"""Measures cells in a time box, and goes on where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...admission import WriteGate
from ...pretrained import path
from ..sessions.estimates import shown
from ..tasks.loss import documents
from ..tasks.recall import TASKS
from .cell import OutOfTime, answer, read_text
from .results import Row, Store
from .variants import LOSS, Cell, Room, Variant, cells, variants

SHIPPED_GATES = ("25", "17", "10")
QUESTIONS = 8  # of a context, unless a task's name says one


@attrs.define(kw_only=True, eq=False)
class Runner:
    """Measures cells until all are done or the time is over.

    `contexts` are those of a cell of eight questions each; tasks of one question get eight times as
    many, so that every cell asks as much. `rows` are what is measured already.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    contexts: int
    seed: int
    deadline: float
    store: Store
    rows: list[Row]
    captured: bool = True
    page_size: int = 16
    say: Callable[[str], object] = print
    left: int = 0
    _prompts: dict[tuple[str, int], list[Any]] = attrs.field(factory=dict)

    def run(self, tasks: Sequence[str], lengths: Sequence[int], found: Sequence[Variant]) -> None:
        """Measures what is not measured yet, the most informative first."""
        done = {(row["task"], row["length"], row["variant"]) for row in self.rows}
        todo = [cell for cell in cells(tasks, lengths, found) if cell.key not in done]
        for number, cell in enumerate(todo):
            try:
                row = self._measure(cell)
            except OutOfTime:
                self.left = len(todo) - number
                return
            self.rows.append(row)
            self.store.add(row)
            self.say(_said(row))

    def _measure(self, cell: Cell) -> Row:
        self._check()
        variant = cell.variant
        row = {
            "task": cell.task,
            "length": cell.length,
            "variant": variant.name,
            "family": variant.family,
            "keep": variant.keep,
            "seed": self.seed,
        }
        try:
            prompts = self._examples(cell.task, cell.length)
        except ValueError as error:  # the text or the length does not do for this task
            return {**row, "skipped": str(error)}
        pipeline = variant.build(self._room(cell))
        if pipeline is None:
            return {**row, "skipped": "cannot be this small"}
        if cell.task == LOSS:
            return row | read_text(
                self.model, pipeline, prompts, page_size=self.page_size, check=self._check
            )
        return row | answer(
            self.model,
            pipeline,
            prompts,
            question_in_prompt=variant.question_in_prompt,
            captured=self.captured,
            page_size=self.page_size,
            check=self._check,
        )

    def _check(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _room(self, cell: Cell) -> Room:
        """What the variant may hold: the bytes of its match on the same prompts."""
        wanted = (cell.task, cell.length, cell.variant.matches)
        for row in self.rows:
            if (row["task"], row["length"], row["variant"]) == wanted and "kv_bytes" in row:
                seen = row["seen_tokens"]
                return Room(row["slots"], seen, seen - cell.length, page=self.page_size)
        return Room(cell.variant.keep * cell.length, cell.length, page=self.page_size)

    def _examples(self, task: str, length: int) -> list[Any]:
        """The same for every variant."""
        if (task, length) not in self._prompts:
            make: Callable[..., list[Any]] = documents if task == LOSS else TASKS[task]
            count = self.contexts * (QUESTIONS if task.startswith("one ") else 1)
            self._prompts[task, length] = make(
                self.tokenizer, self.text, length=length, contexts=count, seed=self.seed
            )
        return self._prompts[task, length]


def variants_for(
    model: str,
    gates: Sequence[Path],
    thresholds: Sequence[float],
    duo: Path | None,
    keeps: Sequence[float],
    budgets: Sequence[float],
    window: int,
) -> list[Variant]:
    """The grid's variants; without gates, "smollm2" has those that are shipped.

    Each gate counts once with its own threshold, or once with each of `thresholds`.
    """
    named = [(file.stem, WriteGate.from_pretrained(file)) for file in gates]
    if model == "smollm2":
        duo = duo or path("duo-smollm2-135m-instruct")
        named = named or [
            (f"{keep}%", WriteGate.from_pretrained(path(f"smollm2-135m-instruct-w64-keep{keep}")))
            for keep in SHIPPED_GATES
        ]
    if thresholds:
        named = [
            (f"{name} over {least:.3g}", attrs.evolve(gate, threshold=least))
            for name, gate in named
            for least in sorted(thresholds)
        ]
    return variants(named, duo, keeps, budgets, window)


def _said(row: Row) -> str:
    place = f"{row['task']}, {row['length']}: {row['variant']}"
    if "skipped" in row:
        return f"{place}: {row['skipped']}"
    score = "accuracy" if "accuracy" in row else "loss"
    size = row["held_tokens"] / row["seen_tokens"]
    return f"{place}: {score} {shown(row[score])}, cache {size:.1%}, {row['seconds']:.1f} s"
