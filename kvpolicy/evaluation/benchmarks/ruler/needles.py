"""Needles in a haystack, of eight kinds."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs

from ..item import Item
from .haystacks import FILLER, Source, draw, hidden

_WORDS = {"words": "name", "numbers": "number", "uuids": "uuid"}


@attrs.frozen(kw_only=True)
class Needles:
    """How many needles of which kinds lie in what.

    `keys` have `values` each, and `asked` of them are asked for in one question. `haystack` is
    "filler", "prose" or "needles" (of the same kind). `singly`: each key is a question of its own.
    """

    name: str
    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1
    singly: int = 1

    def maker(self, source: Source, seed: int) -> Callable[[int], list[Item]]:
        """Makes the questions about a context of so many units; a seed draws the same needles."""

        def make(units: int) -> list[Item]:
            rng = random.Random(seed)
            start = rng.randrange(len(source.sentences))
            known = _different(self.key, source, rng, max(self.keys, self.singly))
            values = iter(_different(self.value, source, rng, len(known) * self.values))
            given = {k: [next(values) for _ in range(self.values)] for k in known}
            needles = [self._needle(k, v) for k, found in given.items() for v in found]
            rng.shuffle(needles)
            if self.haystack == "prose":
                hay = source.prose(start, units)
            elif self.haystack == "filler":
                hay = [FILLER] * units
            else:
                hay = self._like(source, random.Random(seed + 1), units, given)
            context = f"{self._opening()}\n\n{hidden(hay, needles, rng)}"
            groups = (
                [known[: self.asked]] if self.asked > 1 else [[k] for k in known[: self.singly]]
            )
            return [self._item(context, group, given) for group in groups]

        return make

    def _like(
        self, source: Source, rng: random.Random, units: int, given: dict[str, list[str]]
    ) -> list[str]:
        """Needles of the same kind with other keys and values; more units, the same first ones."""
        keys, values = set(given), {v for found in given.values() for v in found}
        hay: list[str] = []
        while len(hay) < units:
            k, v = draw(self.key, source, rng), draw(self.value, source, rng)
            if k not in keys and v not in values:
                keys.add(k)
                values.add(v)
                hay.append(self._needle(k, v))
        return hay

    def _opening(self) -> str:
        what = _WORDS[self.value]
        return (
            f"The text below mentions special {what}s for some keys. Remember them, for you will "
            "be asked about them."
        )

    def _needle(self, key: str, value: str) -> str:
        return f"The special {_WORDS[self.value]} for {key} is {value}."

    def _item(self, context: str, keys: list[str], given: dict[str, list[str]]) -> Item:
        what, several = _WORDS[self.value], len(keys) > 1 or self.values > 1
        named = ", ".join(keys[:-1]) + f" and {keys[-1]}" if len(keys) > 1 else keys[0]
        subject = f"all the special {what}s" if several else f"the special {what}"
        verb = "are" if several else "is"
        return Item(
            task=self.name,
            context=context,
            question=f"What {verb} {subject} for {named} mentioned in the text?",
            lead=f"{subject[0].upper()}{subject[1:]} for {named} mentioned in the text {verb}",
            answers=tuple(v for k in keys for v in given[k]),
            new_tokens=128,
        )


def _different(kind: str, source: Source, rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(kind, source, rng)] = None
    return list(found)


NEEDLES = (
    Needles(name="niah_single_1", haystack="filler"),
    Needles(name="niah_single_2", haystack="prose"),
    Needles(name="niah_single_3", haystack="prose", value="uuids"),
    Needles(name="niah_multikey_1", haystack="prose", keys=4, singly=4),
    Needles(name="niah_multikey_2", haystack="needles", singly=8),
    Needles(name="niah_multikey_3", haystack="needles", key="uuids", value="uuids", singly=8),
    Needles(name="niah_multivalue", haystack="prose", values=4),
    Needles(name="niah_multiquery", haystack="prose", keys=4, asked=4),
)
