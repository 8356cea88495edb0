"""RULER's contexts: each as long as asked for, in the model's own tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..fit import longest
from ..item import Item
from .haystacks import Source
from .lists import common_words, frequent_words, tracing
from .needles import NEEDLES
from .questions import asking, hotpot, squad

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
_FILES = {"qa_1": squad, "qa_2": hotpot}


def ruler(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    contexts: int,
    tasks: Sequence[str] | None = None,
    files: dict[str, Path] | None = None,
    seed: int = 0,
) -> list[Item]:
    """Questions of RULER whose context, question and reply take at most `length` tokens.

    Args:
        text: what prose and words are taken from.
        contexts: contexts of each task; some ask several questions of one.
        tasks: names; default the synthetic ones and those that `files` serve.
        files: SQuAD's file for "qa_1", HotpotQA's for "qa_2".

    Raises:
        ValueError: an unknown task, one whose file is missing, or a length that is too small.
    """
    files = files or {}
    names = list(tasks) if tasks is not None else [*SYNTHETIC, *files]
    if unknown := [x for x in names if x not in _MAKERS and x not in _FILES]:
        known = ", ".join([*_MAKERS, *_FILES])
        raise ValueError(f"tasks: wanted {known}; got {', '.join(unknown)}")
    if missing := [x for x in names if x in _FILES and x not in files]:
        raise ValueError(f"{missing[0]}: wanted its file, in {_FILES[missing[0]].__name__}'s form")
    source, found = Source.of(text), []
    asked = {name: _FILES[name](file) for name, file in files.items()}
    for name in names:
        for number in range(contexts):
            own = zlib.crc32(f"{name} {seed} {number}".encode())
            make = (
                partial(asking, name, asked[name])(own)
                if name in asked
                else _MAKERS[name](source, own)
            )
            units = longest(tokenizer, lambda n, make=make: make(n)[0], length)
            found += make(units)
    return found
