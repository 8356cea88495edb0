"""Measures a benchmark's cells in a time box, and goes on where an earlier run stopped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...adapters.hf import attach
from ...errors import KVPolicyError
from ...pipeline import CachePipeline
from ..grid.cell import OutOfTime, at_a_time
from ..grid.records import TOO_SMALL, Footprint, Measured, Result
from ..grid.results import Store
from ..grid.variants import SEEN, Room, Variant
from ..sessions.estimates import shown
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
class BenchmarkRunner:
    """Measures cells until all are done or the time is over.

    `part` is which of how many parts of each task's contexts this run asks about. Answers are
    greedy without `drawn`, options of `generate` that draw them. `results` are what earlier runs
    measured; cells that failed are tried again. `say` is called with a line for each cell, `starts`
    with each cell before it is measured, its number from 0 and how many there are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    benchmark: Benchmark
    text: str
    contexts: int
    seed: int
    deadline: float
    store: Store
    results: list[Result]
    data: tuple[Path, ...] = ()
    part: tuple[int, int] = (0, 1)
    page_size: int = 16
    drawn: Mapping[str, Any] = attrs.field(factory=dict)
    say: Callable[[str], object] = print
    starts: Callable[[Cell, int, int], object] = lambda cell, number, of: None
    left: int = 0
    _items: dict[tuple[str, int], list[tuple[int, list[Item]]]] = attrs.field(factory=dict)

    def run(self, tasks: Sequence[str], lengths: Sequence[int], found: Sequence[Variant]) -> None:
        """Measures what is not measured yet, composition by composition at each length."""
        done = {result.key for result in self.results if not result.failed}
        whole = [
            Cell(task=task, length=length, variant=variant)
            for length in lengths
            for variant in found
            for task in tasks
        ]
        todo = [cell for cell in whole if cell.key not in done]
        for number, cell in enumerate(todo):
            self.starts(cell, number, len(todo))
            try:
                result = self._measure(cell)
            except OutOfTime:
                self.left = len(todo) - number
                return
            self.results = [x for x in self.results if x.key != result.key] + [result]
            self.store.add(result)
            self.say(_said(result))

    @property
    def failed(self) -> list[Result]:
        """Cells without a result that another run could have."""
        return [result for result in self.results if result.failed]

    def _measure(self, cell: Cell) -> Result:
        self._check()
        variant = cell.variant
        result = Result(
            task=cell.task,
            length=cell.length,
            variant=variant.name,
            family=variant.family,
            keep=variant.keep,
            seed=self.seed,
        )
        try:
            asked = self._asked(cell.task, cell.length)
            pipeline = variant.build(self._room(cell))
            if pipeline is None:
                return attrs.evolve(result, skipped=TOO_SMALL)
            measured = self._answers(cell, pipeline, asked)
        # Data that does not do for the task, or more than the device holds.
        except (KVPolicyError, ValueError, OSError, torch.OutOfMemoryError) as error:
            return attrs.evolve(result, failed=str(error) or type(error).__name__)
        return attrs.evolve(result, measured=measured)

    def _answers(
        self, cell: Cell, pipeline: CachePipeline, asked: list[tuple[int, list[Item]]]
    ) -> Measured:
        began = time.monotonic()
        chat = Chat(self.tokenizer, cell.length, SEEN in cell.variant.family)
        readings: list[Reading] = []
        owners: list[int] = []
        for number, (_, items) in enumerate(asked):
            own = chat.readings(items)
            readings += own
            owners += [number] * len(own)
        texts: list[list[str]] = [[] for _ in asked]
        found: list[tuple[int, Answered]] = []
        with attach(self.model, pipeline, page_size=self.page_size) as here:
            asker = Asker(here=here, tokenizer=self.tokenizer, after=chat.after, drawn=self.drawn)
            torch.manual_seed(self.seed)
            longest = max(len(x.context) + max(x.new_tokens) for x in readings)
            count = 1 if asker.alone else at_a_time(self.model, pipeline, longest)
            for begin in range(0, len(readings), count):
                self._check()
                group = slice(begin, begin + count)
                answers = asker.answers(readings[group])
                found.append((len(readings[group]), answers))
                for owner, own_texts in zip(owners[group], answers.texts, strict=True):
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

    def _check(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _room(self, cell: Cell) -> Room:
        """What the variant may hold: the bytes of its match on the same contexts."""
        match = cell.variant.matches
        if match is None:
            return Room(cell.variant.keep * cell.length, cell.length, page=self.page_size)
        for result in self.results:
            if result.key == (cell.task, cell.length, match) and result.measured is not None:
                size = result.measured.footprint
                return Room(size.slots, size.seen_tokens, page=self.page_size)
        raise ValueError(f"it takes the bytes of {match}, which was not measured")

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
            number, of = self.part
            whole = enumerate(by_context(self.benchmark.items(task, wanted)))
            self._items[task, length] = [x for x in whole if x[0] % of == number]
        found = self._items[task, length]
        if not found:
            raise ValueError(f"part: there are fewer contexts than the {self.part[1]} parts")
        return found


def mean_footprint(sizes: Sequence[Footprint], weights: Sequence[float]) -> Footprint:
    """The mean of sizes, each of so many contexts."""
    names = [field.name for field in attrs.fields(Footprint)]
    return Footprint(
        **{n: statistics.fmean([getattr(x, n) for x in sizes], weights) for n in names}
    )


def _said(result: Result) -> str:
    place = f"{result.task}, {result.length}: {result.variant}"
    done = result.measured
    if done is None:
        return f"{place}: {'failed: ' if result.failed else ''}{result.reason}"
    size = f"cache {done.footprint.held:.1%}"
    return f"{place}: score {shown(done.scores['score'])}, {size}, {done.seconds:.1f} s"
