"""Requests come from an iterable, and finish."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ....errors import CapacityError
from ..attached import Attached
from .expected import Expected
from .load import Load, load_of
from .options import Reader
from .requests import Finished, Reason, Request, Timings
from .room import Room
from .scheduler import Entry, Place, Scheduler, fits
from .served import check_length, expected_new
from .steps import Steps

IDLE = 0.001  # seconds, while there is nothing to do


class Desk:
    """Takes requests of an iterable while there is room, and gives them back as they finish.

    The iterable may give None: nothing for now.
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

    def pull(self) -> None:
        """Takes a request for each free slot, those that are refused included."""
        waiting = len(self.scheduler.at(Place.WAITING, Place.PARKED))
        while self.source is not None and waiting + len(self.finished) < len(self.scheduler.slots):
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
            load = self._load(request)
            prompt, most = load.unlisted + len(load.options.ids), load.options.most
            check_length(self.attachment, prompt + most)
        except Exception as error:
            self._refuse(request, error, 0)
            return False
        entry = self.scheduler.add(prompt, expected_new(self.attachment, prompt, most), load)
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

    def _load(self, request: Request) -> Load:
        """A request with its options, which goes on from the common prefix if it begins so."""
        options = self.reader.options(request)
        load = Load(
            request=request,
            options=options,
            pages=tuple(0 for _ in self.room.limits),
            device=self.steps.tokens.device,
        )
        before = len(self.prefix)
        if before and before < len(options.ids) and options.ids[:before] == self.prefix:
            load.source, load.begun, load.pages = self.room.prefix, before, self.prefix_pages
        return load

    def _refuse(self, request: Any, error: Exception, prompt: int) -> None:
        self.finished.append(
            Finished(
                request=request, tokens=[], text=None, reason="error", error=error,
                prompt_tokens=prompt, timings=Timings(finished=0.0), held=None, parked=0,
            )
        )  # fmt: skip

    def cancel(self) -> None:
        for entry in list(self.scheduler.entries):
            if load_of(entry).request.cancelled:
                self.finish(entry, "cancelled")

    def finish(self, entry: Entry, reason: Reason, error: BaseException | None = None) -> None:
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
