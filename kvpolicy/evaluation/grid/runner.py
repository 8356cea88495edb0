"""Measures the cells of tasks, compositions and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from ...admission import WriteGate
from ...pipeline import CachePipeline
from ...pretrained import names, path
from ..methods.files import Given, named_files
from ..search.calibrate import calibrate
from ..tasks import Task
from ..tasks.prompts import Example
from .cell import answer, read_text
from .loop import Loop
from .parts import dealt
from .records import Measured
from .variants import Cell, Room, Variant, cells, variants

SHIPPED_GATES = {x: f"smollm2-135m-instruct-w64-keep{x}" for x in ("25", "17", "10")}
_NEAR, _TRIALS = 0.03, 9  # of sizes that are searched for


@attrs.define(kw_only=True, eq=False)
class Runner(Loop[Cell]):
    """Measures the cells of the library's own tasks.

    `contexts` are those of a cell of eight questions each; tasks of one question get eight times as
    many, so that every cell asks as much. `part` says which of how many parts of the cells it
    measures.
    """

    captured: bool = True
    part: tuple[int, int] = (0, 1)
    _prompts: dict[tuple[str, int], list[Any]] = attrs.field(factory=dict)

    def run(self, tasks: Sequence[Task], lengths: Sequence[int], found: Sequence[Variant]) -> None:
        """Measures what is not measured yet, the most informative first."""
        self.go_through(dealt(cells(tasks, lengths, found), self.part))

    def measured(self, cell: Cell) -> Measured | None:
        prompts = self._prompts_of(cell.task, cell.length)
        room = self._room(cell)
        pipeline = cell.variant.build(room)
        if pipeline is not None and cell.variant.tuned:
            pipeline = self._tuned(pipeline, room, prompts)
        return None if pipeline is None else self._run(cell, pipeline, prompts)

    def _run(self, cell: Cell, pipeline: CachePipeline, prompts: list[Any]) -> Measured:
        if not cell.task.questions:
            return read_text(
                self.model, pipeline, prompts, page_size=self.page_size, check=self.check
            )
        return answer(
            self.model,
            pipeline,
            prompts,
            question_in_prompt=cell.variant.question_in_prompt,
            captured=self.captured,
            page_size=self.page_size,
            check=self.check,
            tokenizer=self.tokenizer,
        )

    def _room(self, cell: Cell) -> Room:
        """What the variant may hold: the bytes of its match on the same prompts."""
        match = self.matched(cell)
        if match is None:
            asked = _asked(self._prompts_of(cell.task, cell.length))
            slots = cell.variant.keep * cell.length
            return Room(slots, cell.length + asked, asked, page=self.page_size)
        size = match.footprint
        asked = size.seen_tokens - cell.length
        return Room(size.slots, size.seen_tokens, asked, page=self.page_size)

    def _tuned(
        self, pipeline: CachePipeline, room: Room, prompts: Sequence[Any]
    ) -> CachePipeline | None:
        """The pipeline whose cache of the first context has the room's size; None: none is."""
        first = prompts[0].context_ids if isinstance(prompts[0], Example) else prompts[0]
        # A head's last page is half full on average.
        tokens = room.slots - room.page / 2
        try:
            found = calibrate(
                self.model, pipeline, [first], tokens=tokens, tolerance=_NEAR, trials=_TRIALS
            )
        except ValueError:
            return None
        return found.pipeline

    def _prompts_of(self, task: Task, length: int) -> list[Any]:
        """The same for every variant."""
        if (task.name, length) not in self._prompts:
            count = task.contexts(self.contexts)
            self._prompts[task.name, length] = task.make(
                self.tokenizer, self.text, length=length, contexts=count, seed=self.seed
            )
        return self._prompts[task.name, length]


def absent_gates() -> list[str]:
    """Names of SHIPPED_GATES that are not here: a wheel holds one."""
    return [name for name in SHIPPED_GATES.values() if name not in names()]


def _asked(prompts: Sequence[Any]) -> float:
    """Tokens that follow a context until its size is measured: a question and one of its answer."""
    questions = [x.questions[0] for x in prompts if isinstance(x, Example)]
    lengths = [len(x.question_ids) + len(x.answer_ids[:1]) for x in questions]
    return sum(lengths) / len(lengths) if lengths else 0.0


def given_for(model: str, gates: Sequence[Path], duo: Path | None, files: Sequence[str]) -> Given:
    """What methods need; "smollm2" has a gate and a pattern that are shipped.

    Raises:
        ValueError: a text of `files` is no "METHOD=FILE".
    """
    if model == "smollm2":
        duo = duo or path("duo-smollm2-135m-instruct")
        gates = gates or [path(SHIPPED_GATES["25"])]
    gate = WriteGate.from_pretrained(gates[0]) if gates else None
    return Given(gate=gate, duo=duo, files=named_files(files))


def variants_for(
    model: str,
    gates: Sequence[Path],
    thresholds: Sequence[float],
    duo: Path | None,
    keeps: Sequence[float],
    budgets: Sequence[float],
    window: int,
) -> list[Variant]:
    """The grid's variants; without gates, "smollm2" has those of SHIPPED_GATES that are here.

    Each gate counts once with its own threshold, or once with each of `thresholds`.
    """
    if model == "smollm2":
        duo = duo or path("duo-smollm2-135m-instruct")
    named = gates_for(model, gates, thresholds)
    return variants(named, duo, keeps, budgets, window)


def gates_for(
    model: str, gates: Sequence[Path], thresholds: Sequence[float]
) -> list[tuple[str, WriteGate]]:
    """Names and gates; without any, "smollm2" has those that are shipped.

    Each counts once with its own threshold, or once with each of `thresholds`.
    """
    named = [(file.stem, WriteGate.from_pretrained(file)) for file in gates]
    if model == "smollm2":
        named = named or [
            (f"{keep}%", WriteGate.from_pretrained(path(name)))
            for keep, name in SHIPPED_GATES.items()
            if name in names()
        ]
    if thresholds:
        named = [
            (f"{name} over {least:.3g}", attrs.evolve(gate, threshold=least))
            for name, gate in named
            for least in sorted(thresholds)
        ]
    return named
