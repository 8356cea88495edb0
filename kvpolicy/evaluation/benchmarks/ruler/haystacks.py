"""What needles are hidden in, and what they are made of."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Sequence

import attrs

FILLER = ("Rain falls on the hills. Streams run down to the sea. Boats leave at dawn. "
          "They come back at dusk.")  # fmt: skip
_SENTENCE = re.compile(r"\S.*?(?:[.!?][\"')]*(?=\s)|\n\n|$)", re.DOTALL)


@attrs.frozen
class Source:
    """A text's sentences from a random place on, again and again, and its words."""

    sentences: tuple[str, ...]
    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Source:
        """Sentences and words of a text; ValueError where it has too few."""
        sentences = tuple(" ".join(x.split()) for x in _SENTENCE.findall(text))
        words = tuple(sorted(set(re.findall(r"\b[a-z]{4,9}\b", text))))
        if len(words) < 200:
            raise ValueError(f"text: wanted 200 different words or more, got {len(words)}")
        return cls(sentences, words)

    def prose(self, start: int, count: int) -> list[str]:
        """`count` sentences from sentence `start` on; the text begins anew where it ends."""
        of = len(self.sentences)
        return [self.sentences[(start + i) % of] for i in range(count)]


def draw(kind: str, source: Source, rng: random.Random) -> str:
    """A key or value: two "words", a "number" of 7 digits, or a "uuid"."""
    if kind == "words":
        return "-".join(rng.sample(source.words, 2))
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def hidden(units: Sequence[str], needles: Sequence[str], rng: random.Random) -> str:
    """The units as one text, the needles at random places between them, in their order."""
    places = sorted(rng.sample(range(len(units) + len(needles)), len(needles)))
    whole, left, inserts = [], iter(units), iter(needles)
    at = set(places)
    for i in range(len(units) + len(needles)):
        whole.append(next(inserts) if i in at else next(left))
    return " ".join(whole)
