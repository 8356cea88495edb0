"""Measures the cells of a benchmark."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from ...adapters.hf import attach
from ...pipeline import CachePipeline
from ..grid.loop import Loop
from ..grid.records import Footprint, Measured
from ..grid.together import in_groups
from ..grid.variants import SEEN, Room, Variant
from .answers import Answered, Asker
from .benchmark import Benchmark, Wanted
from .chat import Chat, Reading
from .item import Item, by_context


@attrs.frozen(kw_only=True)
class Cell:
    """One variant on one task at one length."""

    task: str
    length: int
    variant: Variant

    @property
    def key(self) -> tuple[str, int, str]:
        """That of its result."""
        return self.task, self.length, self.variant.name


@attrs.define(kw_only=True, eq=False)
class BenchmarkRunner(Loop[Cell]):
    """Measures the cells of a benchmark.

    `contexts` are those of a task; where they bring fewer than `questions`, there are more of them.
    `part` is which of how many parts of each task's contexts this run asks about. Answers are
    greedy without `drawn`, options of `generate` that draw them. `slots` are the questions that are
    asked at once, by default all of some contexts.
    """

    benchmark: Benchmark
    questions: int = 0
    data: tuple[Path, ...] = ()
    part: tuple[int, int] = (0, 1)
    drawn: Mapping[str, Any] = attrs.field(factory=dict)
    slots: int | None = None
    _items: dict[tuple[str, int], list[tuple[int, list[Item]]]] = attrs.field(factory=dict)
    _readings: dict[tuple[str, int, bool], list[tuple[int, Reading]]] = attrs.field(factory=dict)

    def run(self, tasks: Sequence[str], lengths: Sequence[int], found: Sequence[Variant]) -> None:
        """Measures what is not measured yet, composition by composition at each length."""
        self.go_through(
            [
                Cell(task=task, length=length, variant=variant)
                for length in lengths
                for variant in found
                for task in tasks
            ]
        )

    def measured(self, cell: Cell) -> Measured | None:
        asked = self._asked(cell.task, cell.length)
        pipeline = cell.variant.build(self._room(cell))
        return None if pipeline is None else self._answers(cell, pipeline, asked)

    def _answers(
        self, cell: Cell, pipeline: CachePipeline, asked: list[tuple[int, list[Item]]]
    ) -> Measured:
        began = time.monotonic()
        chat = Chat(self.tokenizer, cell.length, SEEN in cell.variant.family)
        whole = self._read(cell, chat)
        readings = [reading for _, reading in whole]
        texts: list[list[str]] = [[] for _ in asked]
        with attach(self.model, pipeline, page_size=self.page_size) as here:
            asker = Asker(
                here=here,
                tokenizer=self.tokenizer,
                after=chat.after,
                drawn=self.drawn,
                slots=self.slots,
            )
            torch.manual_seed(self.seed)
            longest = max(len(x.context) + max(x.new_tokens) for x in readings)

            def answers(group: list[tuple[int, Reading]]) -> tuple[int, Answered]:
                self.check()
                answered = asker.answers([reading for _, reading in group])
                return len(group), answered

            found = in_groups(self.model, pipeline, whole, longest, answers)
            owned = [own for _, answered in found for own in answered.texts]
            for (owner, _), own_texts in zip(whole, owned, strict=True):
                texts[owner] += own_texts
            first = asker.first_token(readings[0])
        scores = tuple(
            statistics.fmean(
                self.benchmark.score(text, item) for text, item in zip(own, items, strict=True)
            )
            for own, (_, items) in zip(texts, asked, strict=True)
        )
        weights = [count for count, _ in found]
        return Measured(
            scores={"score": scores},
            footprint=mean_footprint([x.sizes for _, x in found], weights),
            seconds=time.monotonic() - began,
            questions=sum(map(len, texts)),
            contexts=tuple(place for place, _ in asked),
            kv_footprint=statistics.fmean([x.kv_footprint for _, x in found], weights),
            first_token=first,
            dropped=statistics.fmean(x.dropped for x in readings),
            held_after=statistics.fmean([x.held_after for _, x in found], weights),
        )

    def _room(self, cell: Cell) -> Room:
        """What the variant may hold: the bytes of its match on the same contexts."""
        match = self.matched(cell)
        if match is None:
            return Room(cell.variant.keep * cell.length, cell.length, page=self.page_size)
        size = match.footprint
        return Room(size.slots, size.seen_tokens, page=self.page_size)

    def _read(self, cell: Cell, chat: Chat) -> list[tuple[int, Reading]]:
        """What is read, with the places of its contexts in this part; the same for all variants."""
        key = cell.task, cell.length, chat.seen
        if key not in self._readings:
            asked = enumerate(self._asked(cell.task, cell.length))
            self._readings[key] = [(n, x) for n, (_, own) in asked for x in chat.readings(own)]
        return self._readings[key]

    def _asked(self, task: str, length: int) -> list[tuple[int, list[Item]]]:
        """Numbers and questions of this part's contexts, the same for every variant."""
        if (task, length) not in self._items:
            wanted = Wanted(
                tokenizer=self.tokenizer,
                text=self.text,
                length=length,
                contexts=self.contexts,
                seed=self.seed,
                data=self.data,
            )
            found = self.benchmark.items(task, wanted)
            if 0 < len(found) < self.questions:
                more = math.ceil(self.contexts * self.questions / len(found))
                found = self.benchmark.items(task, attrs.evolve(wanted, contexts=more))
            number, of = self.part
            whole = enumerate(by_context(found))
            self._items[task, length] = [x for x in whole if x[0] % of == number]
        mine = self._items[task, length]
        if not mine:
            raise ValueError(f"part: there are fewer contexts than the {self.part[1]} parts")
        return mine


def mean_footprint(sizes: Sequence[Footprint], weights: Sequence[float]) -> Footprint:
    """The mean of sizes, each of so many contexts."""
    names = [field.name for field in attrs.fields(Footprint)]
    return Footprint(
        **{n: statistics.fmean([getattr(x, n) for x in sizes], weights) for n in names}
    )
