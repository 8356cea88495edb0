"""The loop that serves many requests: prompts in parts, and steps of what decodes between them."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ....errors import CapacityError, PhaseError
from ..attached import Attached
from ..modes import ordinary
from . import prompts
from .expected import Expected
from .load import Load, load_of
from .options import Reader
from .requests import Finished, Reason, Request, Timings
from .room import Room
from .sampling import choose
from .scheduler import Entry, Place, Scheduler, fits
from .served import check_length
from .steps import Steps

IDLE = 0.001  # seconds, while there is nothing to do
SHORT = (CapacityError, torch.OutOfMemoryError)


class Engine:
    """Serves requests of an iterable that is asked for more when there is room.

    It may give None: nothing for now.
    """

    def __init__(
        self,
        attachment: Attached,
        requests: Iterable[Request | None],
        room: Room,
        tokens_per_call: int,
        prefix: Sequence[int],
        reader: Reader,
    ) -> None:
        self.attachment, self.model, self.reader = attachment, attachment.base, reader
        self.source: Iterator[Request | None] | None = iter(requests)
        self.room, self.steps = room, Steps(attachment.base, room)
        selection = attachment.pipeline.selection
        self.whole = room.whole or selection.whole_prompt
        self.tile = selection.tile or 1
        self.scheduler = Scheduler(
            room.slots, room.lanes, tokens_per_call, tile=self.tile, whole=self.whole
        )
        self.expected = Expected(attachment.pipeline, room.state)
        self.bounded = any(n is not None for n in room.limits)
        self.prefix = list(prefix)
        self.prefix_pages = tuple(0 for _ in room.limits)
        self.finished: deque[Finished] = deque()
        self.changed = True  # whether somebody may enter who could not before

    def run(self) -> Iterator[Finished]:
        """Requests as they finish."""
        self._in_turn(self._read_prefix)
        while self.source is not None or self.scheduler.entries:
            self._pull()
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
        self._cancel()
        self._enter()
        parts = self.scheduler.call()
        if parts:
            self._read(parts)
        self._end()
        wanting = [x for x in self.scheduler.at(Place.RUNNING) if load_of(x).made < x.most]
        if wanting:
            self._step(wanting)
        self._hear(all=not wanting)

    # -- requests come and go

    def _pull(self) -> None:
        """Takes a request for each free slot."""
        waiting = len(self.scheduler.at(Place.WAITING, Place.PARKED))
        while self.source is not None and waiting < len(self.scheduler.slots):
            try:
                request = next(self.source)
            except StopIteration:
                self.source = None
                return
            if request is None:
                if not self.scheduler.entries:
                    time.sleep(IDLE)
                return
            waiting += self._add(request)

    def _add(self, request: Request) -> bool:
        """Puts a request into the queue; one that cannot be served has finished."""
        try:
            options = self.reader.options(request)
            check_length(self.attachment, len(options.ids) + options.most)
        except Exception as error:
            self._refuse(request, error, 0)
            return False
        load = Load(
            request=request,
            options=options,
            pages=tuple(0 for _ in self.room.limits),
            device=self.steps.tokens.device,
        )
        before = len(self.prefix)
        if before and before < len(options.ids) and options.ids[:before] == self.prefix:
            load.shared, load.pages = True, self.prefix_pages
        entry = self.scheduler.add(len(options.ids), options.most, load)
        if not fits(self.expected.least(entry), self.room.limits):
            self.scheduler.remove(entry)
            short = CapacityError(
                f"max_bytes: a prompt of {entry.prompt} tokens takes {self.expected.least(entry)} "
                f"pages, the memory has {tuple(self.room.limits)}"
            )
            self._refuse(request, short, entry.prompt)
            return False
        self.changed = True
        return True

    def _refuse(self, request: Any, error: Exception, prompt: int) -> None:
        self.finished.append(
            Finished(
                request=request, tokens=[], text=None, reason="error", error=error,
                prompt_tokens=prompt, timings=Timings(finished=0.0), held=None, parked=0,
            )
        )  # fmt: skip

    def _cancel(self) -> None:
        for entry in list(self.scheduler.entries):
            if load_of(entry).request.cancelled:
                self._finish(entry, "cancelled")

    def _finish(self, entry: Entry, reason: Reason, error: BaseException | None = None) -> None:
        load, present = load_of(entry), entry.place in (Place.READING, Place.RUNNING)
        held = None
        if present:
            held = self.room.what_is_held(entry.lane, entry.slot if entry.lane is None else None)
            self._leave(entry)
        self.scheduler.remove(entry)
        self.changed = True
        now = time.perf_counter()
        since = [None if t is None else t - load.arrived for t in (load.started, load.first)]
        self.finished.append(
            Finished(
                request=load.request,
                tokens=load.tokens,
                text=self._text(load.tokens),
                reason=reason,
                error=error,
                prompt_tokens=entry.prompt,
                timings=Timings(
                    started=since[0], first_token=since[1], finished=now - load.arrived
                ),
                held=held,
                parked=entry.parked,
            )
        )

    def _text(self, tokens: list[int]) -> str | None:
        if self.reader.tokenizer is None:
            return None
        text: str = self.reader.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _leave(self, entry: Entry) -> None:
        if entry.lane is not None:
            self.room.leave(entry.lane, None)
        else:
            assert entry.slot is not None
            self.room.leave(None, entry.slot)
            self.steps.leave(entry.slot)

    def _enter(self) -> None:
        if not self.changed:
            return
        self.changed = False
        for entry in self.scheduler.entering(self._free, self.expected.need):
            load = load_of(entry)
            self.room.state.widen(entry.prompt + entry.most)
            if load.outside is not None:
                try:
                    self._unpark(entry)
                except SHORT as error:
                    if len(self.scheduler.present) == 1:
                        self._finish(entry, "error", error)
                    else:
                        self.scheduler.park(entry)
                    return
            else:
                assert entry.lane is not None
                load.started = time.perf_counter()
                self.room.open_lane(entry.lane, load.shared)
                if load.shared:
                    entry.read = len(self.prefix)
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
        self.room.open_lane(0, shared=False)
        size = max(self.scheduler.tokens // self.tile, 1) * self.tile
        for at in range(0, len(self.prefix), size):
            prompts.read(self.model, self.room, [(0, self.prefix[at : at + size], at, False)])
        self.prefix_pages = self.room.held(self.room.lane_state)[0]
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
                        load_of(entry).options.ids[entry.read : entry.read + count],
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
                self._finish(entry, "error", error)
                continue
            if reason is not None or load.request.cancelled:
                self._finish(entry, reason or "cancelled")

    # -- memory

    def _short(self, error: Exception, rows: dict[Any, Entry]) -> None:
        """Makes room, so that the call that failed may go on at the next turn."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        before = len(self.scheduler.entries)
        self._hear(all=True)
        if len(self.scheduler.entries) < before:
            return
        if isinstance(error, CapacityError) and error.row is not None:
            self._finish(rows[error.row], "error", error)
        elif self.room.state.steps_reserved:
            self.room.unreserve()
        elif (youngest := self.scheduler.youngest()) is not None:
            self._park(youngest)
        else:
            self._finish(next(iter(rows.values())), "error", error)

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
        with contextlib.suppress(ReferenceError):
            self.room.close()


def _lane(entry: Entry) -> int:
    assert entry.lane is not None
    return entry.lane
