"""What every benchmark answers: its tasks, their questions, and how an answer is scored."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import attrs
from transformers import PreTrainedTokenizerBase

from .item import Item, by_context


@attrs.frozen(kw_only=True)
class Wanted:
    """Which questions: at most `length` tokens with their reply, about so many `contexts` a task.

    `text` is what contexts are made from, `data` are a user's files or folders.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str
    length: int
    contexts: int
    seed: int = 0
    data: tuple[Path, ...] = ()


class Benchmark(ABC):
    """A set of tasks. `generated`: contexts are made at any length, else read as they are."""

    generated: bool = False

    @abstractmethod
    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        """Names of the tasks that can be asked with a user's files."""

    @abstractmethod
    def items(self, task: str, wanted: Wanted) -> list[Item]:
        """Questions of one task; ValueError says what is missing."""

    @abstractmethod
    def score(self, answer: str, item: Item) -> float:
        """An answer's score in [0, 1]."""

    def refused(self, task: str) -> str:
        """Why a task of the benchmark is left out; "" for any other name."""
        return ""

    def chosen(self, names: Sequence[str] | None, data: Sequence[Path] = ()) -> tuple[str, ...]:
        """The tasks of these names, or all.

        Raises:
            ValueError: one that does not exist, or is left out.
        """
        known = self.tasks(data)
        for name in names or ():
            if why := self.refused(name):
                raise ValueError(f"task: {name} is left out: {why}")
            if name not in known:
                raise ValueError(f"task: wanted one of {', '.join(known)}, got {name!r}")
        if not known:
            raise ValueError(
                "data: wanted files of the benchmark's tasks, found none; write data=[FOLDER] "
                "(--data FOLDER)"
            )
        return tuple(names) if names else known


def some(items: Sequence[Item], wanted: Wanted) -> list[Item]:
    """The items of as many contexts as wanted, drawn by the seed, in the order of the data."""
    found = by_context(items)
    rng = random.Random(wanted.seed)
    places = sorted(rng.sample(range(len(found)), min(wanted.contexts, len(found))))
    return [item for place in places for item in found[place]]
