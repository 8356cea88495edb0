"""Who reads, decodes, waits and is parked; plain Python, without a model or a clock.

First come, first served: a request enters when its slot and the pages that it is expected to need
are there, and none enters before an earlier one. Parked ones came before those that still wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import attrs

Pages = tuple[int, ...]  # of each pool


class Place(Enum):
    """Where a request is."""

    WAITING = "waiting"
    READING = "reading"
    RUNNING = "running"
    PARKED = "parked"
    GONE = "gone"


@attrs.define(eq=False)
class Entry:
    """A request as the scheduler sees it.

    `prompt` tokens are to be read, of which `read` are, and `most` new ones are planned for. `slot`
    is where it decodes, kept from the start; `lane` where its prompt is read, until it has `ended`.
    """

    order: int
    prompt: int
    most: int
    read: int = 0
    place: Place = Place.WAITING
    slot: int | None = None
    lane: int | None = None
    ended: bool = False
    parked: int = 0
    load: Any = None  # the engine's

    @property
    def left(self) -> int:
        """Prompt tokens that are still to be read."""
        return self.prompt - self.read


class Scheduler:
    """Slots, lanes and queues.

    Args:
        slots: sequences that decode together.
        lanes: prompts that are read together.
        tokens: of prompts in one call: between two decode steps there is one call at most.
        tile: prompts are cut at multiples of it.
        whole: prompts are not cut.
    """

    def __init__(
        self, slots: int, lanes: int, tokens: int, *, tile: int | None = None, whole: bool = False
    ) -> None:
        self.tokens, self.tile, self.whole = tokens, tile or 1, whole
        self.entries: list[Entry] = []  # in order of arrival, without those that are gone
        self.slots, self.lanes = [*range(slots)], [*range(lanes)]  # free ones
        self.orders = 0
        self.tight = False  # somebody was parked, and nobody has left since

    def add(self, prompt: int, most: int, load: Any = None) -> Entry:
        """A new request, at the end of the queue."""
        entry = Entry(self.orders, prompt, most, load=load)
        self.orders += 1
        self.entries.append(entry)
        return entry

    def at(self, *places: Place) -> list[Entry]:
        """Those at some of the places, the oldest first."""
        return [entry for entry in self.entries if entry.place in places]

    @property
    def present(self) -> list[Entry]:
        """Those that hold pages."""
        return self.at(Place.READING, Place.RUNNING)

    def entering(self, free: Callable[[], Sequence[int | None]], need: Need) -> Iterator[Entry]:
        """Gives slots and lanes to those that may enter now, one after another.

        `free` are pages that are free, less those promised to who is present; `need` those that one
        is expected to take. One that is alone enters whatever it needs.
        """
        for entry in self.at(Place.WAITING, Place.PARKED):
            if not self.slots or not (entry.ended or self.lanes):
                return
            if self.present and (self.tight or not fits(need(entry), free())):
                return
            entry.slot = self.slots.pop(0)
            entry.lane = None if entry.ended else self.lanes.pop(0)
            entry.place = Place.RUNNING if entry.ended else Place.READING
            yield entry

    def call(self) -> list[tuple[Entry, int]]:
        """The next prompt call: whose tokens, and how many, up to `tokens` in all.

        What may not be cut goes beyond that, alone.
        """
        parts: list[tuple[Entry, int]] = []
        room = self.tokens
        for entry in self.at(Place.READING):
            if entry.left and (count := self._part(entry, room, alone=not parts)):
                parts.append((entry, count))
                room -= count
        return parts

    def _part(self, entry: Entry, room: int, alone: bool) -> int:
        if entry.left <= room:
            return entry.left
        if self.whole:
            return entry.left if alone else 0
        count = (entry.read + max(room, 0)) // self.tile * self.tile - entry.read
        if count <= 0 and alone:
            count = min(self.tile - entry.read % self.tile, entry.left)
        return max(count, 0)

    def end(self, entry: Entry) -> None:
        """The prompt of `entry` has ended: it decodes from now on."""
        self._leave_lane(entry)
        entry.place, entry.ended = Place.RUNNING, True

    def youngest(self) -> Entry | None:
        """Who is parked when memory runs short; None where one is alone."""
        present = self.present
        return present[-1] if len(present) > 1 else None

    def park(self, entry: Entry) -> None:
        """Takes `entry` out of its slot; it comes back before any that waits."""
        self._leave(entry)
        entry.place, entry.parked = Place.PARKED, entry.parked + 1
        self.tight = True

    def step_back(self, entry: Entry) -> None:
        """`entry` was to enter and found no memory: it goes back to where it came from."""
        self._leave(entry)
        entry.place = Place.PARKED if entry.parked else Place.WAITING
        self.tight = True

    def remove(self, entry: Entry) -> None:
        """Ends `entry`, wherever it is."""
        self._leave(entry)
        entry.place, self.tight = Place.GONE, False
        self.entries.remove(entry)

    def _leave(self, entry: Entry) -> None:
        self._leave_lane(entry)
        if entry.slot is not None:
            self.slots.append(entry.slot)
            self.slots.sort()
            entry.slot = None

    def _leave_lane(self, entry: Entry) -> None:
        if entry.lane is not None:
            self.lanes.append(entry.lane)
            self.lanes.sort()
            entry.lane = None


Need = Callable[[Entry], Pages]


def fits(need: Sequence[int], free: Sequence[int | None]) -> bool:
    """Whether so many pages of each pool are free; None: as many as one likes."""
    return all(have is None or n <= have for n, have in zip(need, free, strict=True))
