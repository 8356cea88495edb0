"""A needle in a haystack at depths of a context: the needle-in-a-haystack test."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import attrs

from . import scores
from .benchmark import Benchmark, Wanted
from .fit import longest
from .item import Item
from .ruler.haystacks import Source, draw

DEPTHS = (0, 25, 50, 75, 100)


@attrs.frozen
class Niah(Benchmark):
    """A number to find in prose; a task is a depth, "depth 0" before all prose, 100 behind it."""

    generated = True

    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        return tuple(f"depth {depth}" for depth in DEPTHS)

    def items(self, task: str, wanted: Wanted) -> list[Item]:
        source, depth = Source.of(wanted.text), int(task.split()[1]) / 100
        found = []
        for number in range(wanted.contexts):
            # The same prose and needle at every depth.
            make = partial(
                _item, task, depth, source, zlib.crc32(f"{wanted.seed} {number}".encode())
            )
            found += make(longest(wanted.tokenizer, make, wanted.length))
        return found

    def score(self, answer: str, item: Item) -> float:
        return scores.all_found(answer, item.answers)


def _item(task: str, depth: float, source: Source, seed: int, units: int) -> list[Item]:
    rng = random.Random(seed)
    key, value = draw("words", source, rng), draw("numbers", source, rng)
    prose = source.prose(rng.randrange(len(source.sentences)), units)
    prose.insert(round(depth * units), f"The special number for {key} is {value}.")
    return [
        Item(
            task=task,
            context="A special number is hidden in the text below. Remember it, for you will be "
            f"asked about it.\n\n{' '.join(prose)}",
            question=f"What is the special number for {key} mentioned in the text?",
            lead=f"The special number for {key} mentioned in the text is",
            answers=value,
            new_tokens=32,
        )
    ]
