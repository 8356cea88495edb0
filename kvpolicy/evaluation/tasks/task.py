"""A task, with all that the grid, the claims and the command need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

QUESTIONS = 8  # of a context, where a task asks several


@attrs.frozen(kw_only=True)
class Bound:
    """A score that a write gate with at most `most` of the cache is to reach.

    `part` is that of full attention's: at least it below 1, at most it above.
    """

    score: str
    part: float
    most: float


@attrs.frozen(kw_only=True, eq=False)
class Task:
    """What is asked of every composition.

    `make(tokenizer, text, length=..., contexts=..., seed=...)` gives an `Example` a context, or
    documents `[N]` where a task asks no `questions` and next-token loss is measured. `core`: it
    comes first, `default`: it is measured where no task is named. `retrieval`: gates are set
    against what takes as many bytes. `decoded`: answers are long enough that selections, and
    evictions that know the question, act on them. `bounds` are what gates are to reach.
    """

    name: str
    make: Callable[..., list[Any]]
    questions: int = QUESTIONS
    core: bool = False
    default: bool = True
    retrieval: bool = False
    decoded: bool = False
    bounds: tuple[Bound, ...] = ()

    def contexts(self, count: int) -> int:
        """Contexts that ask as much as `count` of several questions, or as many documents."""
        return count * (QUESTIONS // self.questions if self.questions else 1)
