"""The loop that serves many requests: prompts in parts, and steps of what decodes between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ....errors import CapacityError, PhaseError
from ..modes import ordinary
from . import prompts
from .desk import Desk
from .load import load_of
from .requests import Finished
from .sampling import choose
from .scheduler import Entry, Place

SHORT = (CapacityError, torch.OutOfMemoryError)


class Engine(Desk):
    """Serves what comes to its desk."""

    def run(self) -> Iterator[Finished]:
        """Requests as they finish."""
        self._in_turn(self._read_prefix)
        while self.source is not None or self.scheduler.entries:
            self.pull()
            self._in_turn(self._turn)
            while self.finished:
                yield self.finished.popleft()

    @ordinary
    def _in_turn(self, what: Any) -> None:
        if not self.attachment.attached:
            raise PhaseError("generate_many: the pipeline was detached; the requests end here")
        with self.attachment.forwards.holding():
            what()

    def _turn(self) -> None:
        self.cancel()
        self._enter()
        parts = self.scheduler.call()
        if parts:
            self._read(parts)
        self._end()
        running = self.scheduler.at(Place.RUNNING)
        wanting = [x for x in running if load_of(x).made < load_of(x).options.most]
        if wanting:
            self._step(wanting)
        self._hear(all=not wanting)

    def _enter(self) -> None:
        if not self.changed:
            return
        self.changed = False
        for entry in self.scheduler.entering(self._free, self.expected.need):
            while True:
                try:
                    self._begin(entry)
                    break
                except SHORT as error:
                    _empty(error)
                    if len(self.scheduler.present) > 1:
                        self.scheduler.step_back(entry)
                        return
                    if not self._spare():
                        self.finish(entry, "error", error)
                        return

    def _begin(self, entry: Entry) -> None:
        """Gives an entry what it needs in its slot or lane; SHORT with nothing changed."""
        load = load_of(entry)
        self.room.state.widen(entry.prompt + entry.most)
        if load.outside is not None:
            self._unpark(entry)
            return
        assert entry.lane is not None
        self.room.open_lane(entry.lane, load.source)
        load.started = time.perf_counter()
        if load.source is not None:
            entry.read = load.begun
            self.expected.began(entry, self.room.stored(entry.lane))

    def _free(self) -> Sequence[int | None]:
        """Free pages, less what those who are present are still expected to take."""
        free = self.room.free() if self.bounded else self.room.limits
        promised = [self.expected.need(x) for x in self.scheduler.present]
        return [
            None if n is None else n - sum(p[pool] for p in promised) for pool, n in enumerate(free)
        ]

    # -- prompts

    def _read_prefix(self) -> None:
        if not self.prefix:
            return
        self.room.open_lane(0)
        size = max(self.scheduler.tokens // self.tile, 1) * self.tile
        try:
            for at in range(0, len(self.prefix), size):
                prompts.read(self.model, self.room, [(0, self.prefix[at : at + size], at, False)])
        except SHORT as error:  # each request reads its own
            _empty(error)
            self.room.leave(0, None)
            self.prefix = []
            return
        self.prefix_pages = self.room.shared(self.room.lane_state)[0]
        self.room.keep_prefix(0)

    def _read(self, parts: list[tuple[Entry, int]]) -> None:
        ending = [entry for entry, count in parts if count == entry.left]
        try:
            logits = prompts.read(
                self.model,
                self.room,
                [
                    (
                        _lane(entry),
                        load_of(entry).next_ids(entry.read, count),
                        entry.read,
                        count == entry.left,
                    )
                    for entry, count in parts
                ],
            )
        except SHORT as error:
            self._short(error, {_lane(entry): entry for entry, _ in parts})
            return
        for entry, count in parts:
            entry.read += count
        if self.bounded:
            self._measure([entry for entry, _ in parts])
        if ending:
            chosen = choose([load_of(x) for x in ending], logits)
            for entry, token in zip(ending, chosen, strict=True):
                load_of(entry).ready = token

    def _measure(self, entries: Sequence[Entry]) -> None:
        """Learns what prompts took so far."""
        held = self.room.held(self.room.lane_state)
        for entry in entries:
            load_of(entry).pages = held[_lane(entry)]
            if self.expected.learned:
                self.expected.read(entry, self.room.stored(_lane(entry)))
        self.changed = True

    def _end(self) -> None:
        """Moves prompts that were read to their slots."""
        for entry in self.scheduler.at(Place.READING):
            load = load_of(entry)
            if load.ready is None:
                continue
            assert entry.slot is not None
            try:
                self.room.end_prompt(_lane(entry), entry.slot)
            except SHORT as error:
                self._short(error, {0: entry})
                return
            self.scheduler.end(entry)
            token, load.ready = load.ready, None
            self.steps.enter(entry, token, 0)
            self.steps.took([entry], self.steps.tokens[[entry.slot]])
            if self.bounded:
                load.pages = self.room.held(self.room.state)[entry.slot]
            self.changed = True

    # -- steps

    def _step(self, entries: Sequence[Entry]) -> None:
        rows = {entry.slot: entry for entry in self.scheduler.at(Place.RUNNING)}
        try:
            self.room.maintain()  # where one that was due found no memory
            self.steps.step(entries)
        except SHORT as error:
            self._short(error, rows)
            return
        try:
            self.room.maintain()
        except SHORT as error:  # it stays due
            self._short(error, rows)

    def _hear(self, all: bool = False) -> None:
        """Looks at tokens; those that end a request empty its slot."""
        for entry, token in self.steps.known(all):
            if entry.place is Place.GONE:
                continue
            load = load_of(entry)
            try:
                reason = load.said(token)
            except Exception as error:
                self.finish(entry, "error", error)
                continue
            if reason is not None or load.request.cancelled:
                self.finish(entry, reason or "cancelled")

    # -- memory

    def _short(self, error: Exception, rows: dict[Any, Entry]) -> None:
        """Makes room, so that the call that failed may go on at the next turn."""
        _empty(error)
        before = len(self.scheduler.entries)
        self._hear(all=True)
        if len(self.scheduler.entries) < before:
            return
        if isinstance(error, CapacityError) and error.row is not None:
            self.finish(rows[error.row], "error", error)
        elif self.room.state.steps_reserved:
            self.room.unreserve()
        elif (youngest := self.scheduler.youngest()) is not None:
            self._park(youngest)
        elif not self._spare():
            self.finish(next(iter(rows.values())), "error", error)

    def _spare(self) -> bool:
        """Gives up what one that is alone can do without; whether there was anything.

        First what is reserved for steps to come, then the common prefix: who has not begun reads
        its own then.
        """
        if self.room.state.steps_reserved:
            self.room.unreserve()
            return True
        if (source := self.room.prefix) is None:
            return False
        self.room.drop_prefix()
        self.prefix = []
        for entry in self.scheduler.entries:
            load = load_of(entry)
            if load.source is source and not entry.read:
                load.source, load.pages = None, tuple(0 for _ in load.pages)
        return True

    def _park(self, entry: Entry) -> None:
        self._hear(all=True)
        if entry.place not in (Place.READING, Place.RUNNING):
            return  # it ended
        load = load_of(entry)
        lane, slot = entry.lane, entry.slot if entry.lane is None else None
        if load.ready is not None:
            load.ready = int(load.ready)
        load.outside = self.room.park(lane, slot)
        load.pages = load.outside.parked.pages
        if slot is not None:
            self.steps.leave(slot)
        self.scheduler.park(entry)

    def _unpark(self, entry: Entry) -> None:
        load = load_of(entry)
        assert load.outside is not None
        lane = entry.lane
        self.room.unpark(load.outside, lane, entry.slot if lane is None else None)
        load.outside = None
        if lane is None:
            self.steps.enter(entry, load.tokens[-1], len(load.tokens) - 1)

    def close(self) -> None:
        """Frees the memory."""
        if self.steps.stepper is not None:
            self.attachment.decoding = self.room.decoding.decoding
        self.room.close()


def _lane(entry: Entry) -> int:
    assert entry.lane is not None
    return entry.lane


def _empty(error: Exception) -> None:
    """Gives what torch keeps back to a device whose memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
