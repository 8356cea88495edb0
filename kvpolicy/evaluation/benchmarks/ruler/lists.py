"""Tracing variables and counting words: a context is needed as a whole."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..item import Item
from .haystacks import FILLER, Source, hidden

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HOPS = 4
_COMMON, _OFTEN, _RARELY = 10, 30, 3
_ALPHA, _CODED = 2.0, 50

Maker = Callable[[int], list[Item]]


def tracing(source: Source, seed: int) -> Maker:
    """`vt`: a chain of 4 assignments in filler text; all 5 variables of a value are asked for."""

    def chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
        names: list[str] = []
        while len(names) < _HOPS + 1:
            name = "".join(rng.choice(_LETTERS) for _ in range(5))
            if name not in names:
                names.append(name)
        value = str(rng.randrange(10_000, 100_000))
        said = [f"VAR {names[0]} = {value}."]
        said += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
        return value, names, said

    def make(units: int) -> list[Item]:
        rng = random.Random(seed)
        shown, example, said = chain(rng)
        value, names, assigned = chain(rng)
        opening = (
            "Variables are assigned in the text below, some of them by way of others. Follow the "
            f"assignments.\n\nExample: {' '.join(said)} The variables with the value {shown} are "
            f"{', '.join(example)}."
        )
        return [
            Item(
                task="vt",
                context=f"{opening}\n\n{hidden([FILLER] * units, assigned, rng)}",
                question=f"Which variables of the text have the value {value}? Name all of them.",
                lead=f"The {_HOPS + 1} variables with the value {value} are",
                answers=tuple(names),
                new_tokens=30,
            )
        ]

    return make


def common_words(source: Source, seed: int) -> Maker:
    """`cwe`: a numbered list in which 10 words occur 30 times and all others 3 times."""

    def make(units: int) -> list[Item]:
        common = random.Random(seed).sample(source.words, _COMMON)
        rng = random.Random(seed + 1)
        left = [word for word in source.words if word not in common]
        others = rng.sample(left, min(units, len(left)))
        known = {*common, *others}
        while len(others) < units:  # a text with few words: two of them as one
            word = "".join(rng.sample(source.words, 2))
            if word not in known:
                others.append(word)
                known.add(word)
        listed = common * _OFTEN + others * _RARELY
        rng.shuffle(listed)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return [
            Item(
                task="cwe",
                context="Below is a numbered list of words, some of which come often.\n\n"
                f"{numbered}",
                question=f"Which are the {_COMMON} most common words of the list?",
                lead=f"The {_COMMON} most common words of the list are:",
                answers=tuple(common),
                new_tokens=120,
            )
        ]

    return make


def frequent_words(source: Source, seed: int) -> Maker:
    """`fwe`: coded words by a zeta distribution; the three most frequent ones after dots."""

    def make(units: int) -> list[Item]:
        rng = random.Random(seed)
        coded = ["....."]
        while len(coded) < _CODED:
            word = "".join(rng.choice(_LETTERS.lower()) for _ in range(6))
            if word not in coded:
                coded.append(word)
        weights = [rank**-_ALPHA for rank in range(1, _CODED + 1)]
        # Counts, not draws, so that the order of the first words is never chance's.
        counts = [round(units * w / sum(weights)) for w in weights]
        listed = [word for word, n in zip(coded, counts, strict=True) for _ in range(n)]
        rng.shuffle(listed)
        return [
            Item(
                task="fwe",
                context="Read the coded text below and keep track of how often each coded word "
                f"comes. Dots are no word.\n\n{' '.join(listed)}",
                question="Which three coded words come most often in the text? Leave the dots out.",
                lead="The three coded words that come most often are:",
                answers=tuple(coded[1:4]),
                new_tokens=50,
            )
        ]

    return make
