"""What the parts of a cache that hold different heads tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Exchange(Protocol):
    """The parts that hold the heads of one model between them, in the order of their heads.

    Every part must come to every exchange. What calls a pipeline lets a part that failed elsewhere
    say so where the others next exchange something, which then raises there.
    """

    @property
    def parts(self) -> int:
        """How many parts there are."""

    @property
    def part(self) -> int:
        """Which of them this is, from 0."""

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """What each part says `[parts][n]`; as many `own` numbers in every part."""

    def heads(self, x: Tensor) -> Tensor:
        """`x` `[B, H, ...]` of the heads here, one shape in every part, of all parts' heads."""


class Alone:
    """A cache that holds every head."""

    parts, part = 1, 0

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        return [list(own)]

    def heads(self, x: Tensor) -> Tensor:
        return x


ALONE = Alone()


def own_heads(exchange: Exchange, x: Tensor) -> Tensor:
    """This part's of what `exchange.heads` gave."""
    return x.chunk(exchange.parts, 1)[exchange.part]
