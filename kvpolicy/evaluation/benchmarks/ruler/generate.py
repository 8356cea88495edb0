"""RULER's contexts: each as long as asked for, in the model's own tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import attrs

from .. import scores
from ..benchmark import Benchmark, Wanted
from ..fit import longest
from ..item import Item
from .haystacks import Source
from .lists import common_words, frequent_words, tracing
from .needles import NEEDLES
from .questions import QUESTIONS, answered, asking

#: The tasks of a needle in a haystack.
RETRIEVAL = tuple(x.name for x in NEEDLES)
_MAKERS: dict[str, Callable[[Source, int], Callable[[int], list[Item]]]] = {
    **{x.name: x.maker for x in NEEDLES},
    "vt": tracing,
    "cwe": common_words,
    "fwe": frequent_words,
}
#: The tasks that need nothing but a text.
SYNTHETIC = tuple(_MAKERS)


@attrs.frozen
class Ruler(Benchmark):
    """RULER; among a user's files SQuAD's serves `qa_1` and HotpotQA's `qa_2`."""

    generated = True

    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        return (*SYNTHETIC, *sorted(answered(data)))

    def items(self, task: str, wanted: Wanted) -> list[Item]:
        most = 1 << 24
        if task in QUESTIONS:
            asked = QUESTIONS[task](answered(wanted.data)[task])
            make = partial(asking, task, asked)
            most = sum(len(x.passages) for x in asked)
        else:
            make = partial(_MAKERS[task], Source.of(wanted.text))
        found = []
        for number in range(wanted.contexts):
            own = make(zlib.crc32(f"{task} {wanted.seed} {number}".encode()))
            units = longest(wanted.tokenizer, own, wanted.length, 1, most)
            found += own(units)
        return found

    def score(self, answer: str, item: Item) -> float:
        found = scores.any_found if item.task in QUESTIONS else scores.all_found
        return found(answer, item.answers)
