"""Goes through cells in a time box, and on where an earlier run stopped."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import attrs
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import KVPolicyError
from ..sessions.estimates import shown
from .cell import OutOfTime
from .records import TOO_SMALL, Measured, Result
from .results import Store

C = TypeVar("C", bound=Any)  # has a `key`, that of its result, and a `variant`


@attrs.define(kw_only=True, eq=False)
class Loop(ABC, Generic[C]):
    """Measures cells until all are done or the time is over.

    `results` are what earlier runs measured; cells that failed are tried again. `say` is called
    with a line for each cell, `starts` with each cell before it is measured, its number from 0 and
    how many there are. `left` counts cells that the time did not allow.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    contexts: int
    seed: int
    deadline: float
    store: Store
    results: list[Result]
    page_size: int = 16
    say: Callable[[str], object] = print
    starts: Callable[[C, int, int], object] = lambda cell, number, of: None
    left: int = 0

    @abstractmethod
    def measured(self, cell: C) -> Measured | None:
        """What a cell gives; None: its variant cannot be this small.

        Raises:
            ValueError, OSError, KVPolicyError, torch.OutOfMemoryError: data that does not do for
                the task, or more than the device holds; the cell has failed then.
        """

    def go_through(self, whole: Sequence[C]) -> None:
        """Measures, in this order, what is not measured yet; a cell named twice once."""
        done = {result.key for result in self.results if not result.failed}
        todo = [cell for key, cell in {x.key: x for x in whole}.items() if key not in done]
        for number, cell in enumerate(todo):
            self.starts(cell, number, len(todo))
            try:
                result = self._result(cell)
            except OutOfTime:
                self.left = len(todo) - number
                return
            self.results = [x for x in self.results if x.key != result.key] + [result]
            self.store.add(result)
            self.say(said(result))

    @property
    def failed(self) -> list[Result]:
        """Cells without a result that another run could have."""
        return [result for result in self.results if result.failed]

    def matched(self, cell: C) -> Measured | None:
        """What the variant took whose bytes this one is to take; None: it matches none.

        Raises:
            ValueError: that one was not measured.
        """
        match = cell.variant.matches
        if match is None:
            return None
        for result in self.results:
            if result.key == (*cell.key[:2], match) and result.measured is not None:
                return result.measured
        raise ValueError(f"it takes the bytes of {match}, which was not measured")

    def check(self) -> None:
        """Raises OutOfTime after the deadline."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _result(self, cell: C) -> Result:
        self.check()
        task, length, _ = cell.key
        variant = cell.variant
        result = Result(
            task=task,
            length=length,
            variant=variant.name,
            family=variant.family,
            keep=variant.keep,
            seed=self.seed,
        )
        try:
            found = self.measured(cell)
        except (KVPolicyError, ValueError, OSError, torch.OutOfMemoryError) as error:
            return attrs.evolve(result, failed=str(error) or type(error).__name__)
        if found is None:
            return attrs.evolve(result, skipped=TOO_SMALL)
        return attrs.evolve(result, measured=found)


def said(result: Result) -> str:
    """A line about a cell: its first score, its size and its seconds, or why there are none."""
    place = f"{result.task}, {result.length}: {result.variant}"
    done = result.measured
    if done is None:
        return f"{place}: {'failed: ' if result.failed else ''}{result.reason}"
    name, values = next(iter(done.scores.items()))
    size = f"cache {done.footprint.held:.1%}"
    return f"{place}: {name} {shown(values)}, {size}, {done.seconds:.1f} s"
