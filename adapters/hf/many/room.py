"""The memory of many requests: slots that decode, lanes that read, and what is parked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from ....ops import pages_of
from ....store import (
    CacheState,
    Parked,
    clear,
    free_pages,
    held_pages,
    move,
    park,
    side_state,
    unpark,
)
from ....store.fork import select_rows
from ..attached import Attached
from ..cache import KVPolicyCache
from .requests import Held
from .scheduler import Pages

LANES = 8  # prompts read together: enough to fill a call, each costs the window's memory


class SlotCache(KVPolicyCache):
    """A cache whose sequences come and go: no columns are common to them."""

    def __init__(self, model: Any, pipeline: Any, **options: Any) -> None:
        super().__init__(model, pipeline, **options)
        self.chunks = [(1, None)]  # it has begun, whatever its sequences hold
        self.recording = True  # evictions are no part of a step, which cannot be taken back

    def saw(self, columns: int, valid: Tensor | None) -> None:
        """Columns are not counted."""

    @property
    def gapped(self) -> list[bool]:
        """A sequence ends for good, and a slot is emptied before the next one enters."""
        return [False] * (0 if self.state is None else self.state.batch)


@attrs.define(eq=False)
class Outside:
    """A sequence in the host's memory; `states` are those of the model's own layers."""

    parked: Parked
    states: list[dict[str, Any]] | None


class Source(NamedTuple):
    """A sequence that others go on from: that in `row` of `state`, and its layers' `states`."""

    state: CacheState
    row: int
    states: list[dict[str, Any]]


class Room:
    """`slots` sequences that decode, beside `lanes` prompts; all on the same pages.

    Those are the pages of `asked`, where that is given: a cache whose sequences are asked questions
    in place of prompts.
    """

    def __init__(
        self,
        attachment: Attached,
        slots: int,
        sizes: dict[str, Any],
        asked: KVPolicyCache | None = None,
    ) -> None:
        served, pipeline = attachment.served, attachment.pipeline

        def cache() -> SlotCache:
            return SlotCache(
                attachment.base, pipeline, known=served, dtype=attachment.dtype, **sizes
            )

        self.pipeline, self.slots = pipeline, slots
        self.decoding, self.reading = cache(), cache()
        # What goes on from states, or reads the keys of other layers, is not packed.
        own = bool(self.decoding.states) or bool(served.readers) or asked is not None
        self.lanes = 1 if own else min(slots, LANES)
        self.whole = not served.probe.goes_on and bool(self.decoding.states)
        if asked is None:
            state = self.decoding.ensure_state(slots)
        else:
            assert asked.state is not None
            state = side_state(asked.state, slots)
            self.decoding.take_state(state)
            self.reading.phase = "decode"  # a question's tokens are decoded ones
        clear(state, range(slots))
        self.decoding.phase = "decode"
        self.reading.take_state(side_state(state, self.lanes))
        clear(self.lane_state, range(self.lanes))
        self.last = side_state(state)  # of one sequence, whose prompt ends
        clear(self.last, [0])
        self.prefix: Source | None = None

    @property
    def state(self) -> CacheState:
        """Of the slots."""
        assert self.decoding.state is not None
        return self.decoding.state

    @property
    def lane_state(self) -> CacheState:
        """Of the lanes."""
        assert self.reading.state is not None
        return self.reading.state

    @property
    def limits(self) -> list[int | None]:
        """Pages that each pool may have."""
        return [pool.limit for pool in self.state.devices.pools]

    def free(self) -> list[int | None]:
        """Pages of each pool that can be taken."""
        return list(free_pages(self.state).values())

    def held(self, state: CacheState) -> list[Pages]:
        """Pages of each sequence by pool."""
        return list(zip(*held_pages(state).values(), strict=True))

    def shared(self, state: CacheState) -> list[Pages]:
        """Pages of each sequence by pool that a fork has in common with it: the full ones."""
        found = {
            pool: torch.zeros(state.batch, dtype=torch.int64, device=pool.device)
            for pool in state.devices.pools
        }
        for pool in found:
            counts = [x.counts for x in state.managed if x.pool is pool]
            if counts:
                found[pool] += (torch.cat(counts, 1) // pool.page_size).sum(1)
        return list(zip(*(x.tolist() for x in found.values()), strict=True))

    def stored(self, lane: int) -> int:
        """Global tokens of a lane, over all heads of the layers that policies manage."""
        devices: dict[torch.device, list[Tensor]] = {}
        for layer in self.lane_state.managed:
            devices.setdefault(layer.device, []).append(layer.counts)
        return sum(int(torch.cat(x, 1)[lane].sum()) for x in devices.values())

    def unreserve(self) -> None:
        """Gives back what is reserved for decode steps to come."""
        self.state.devices.release()
        self.state.steps_reserved = 0

    def maintain(self) -> None:
        """Evicts where that is due while decoding; CapacityError with nothing changed."""
        if self.pipeline.due(self.state):
            self.state.sync_host()  # rows that ended meanwhile are not due
            self.pipeline.maintain(self.state)

    def open_lane(self, lane: int, source: Source | None = None) -> None:
        """Makes an empty lane ready for a prompt, after what a `source` holds.

        Raises CapacityError, with the lane as it was: a fork has pages of its own where its heads
        end.
        """
        fork = None if source is None else select_rows(source.state, [source.row])
        self.lane_state.resume([lane])
        if source is not None and fork is not None:
            move(self.lane_state, lane, fork, 0)
            self._put(self.reading, lane, source.states)

    def keep_prefix(self, lane: int) -> None:
        """What a lane has read becomes the common prefix; the lane is empty then."""
        kept = side_state(self.state)
        clear(kept, [0])
        states = self.reading.states.select([lane]) if self.reading.states else []
        move(kept, 0, self.lane_state, lane)
        self.reading.states.clear([lane])
        self.prefix = Source(kept, 0, states)

    def drop_prefix(self) -> None:
        """Gives up the common prefix; those that went on from it keep their own."""
        assert self.prefix is not None
        clear(self.prefix.state, [0])
        self.prefix = None

    def end_prompt(self, lane: int, slot: int) -> None:
        """Ends the prompt of a lane, and makes its sequence that of an empty slot.

        Evictions see it alone. Raises CapacityError, with the lane as it was.
        """
        lanes = self.lane_state
        if lanes.sequences[lane].prompt_open:
            move(self.last, 0, lanes, lane)
            try:
                self.pipeline.end_prompt(self.last)
            except BaseException:
                move(lanes, lane, self.last, 0)
                raise
            move(self.state, slot, self.last, 0)
        else:
            move(self.state, slot, lanes, lane)
        if self.reading.states:
            self.decoding.states.move(slot, self.reading.states, lane, self.slots)

    def leave(self, lane: int | None, slot: int | None) -> None:
        """Empties a lane, or a slot."""
        cache, row = self._at(lane, slot)
        assert cache.state is not None
        clear(cache.state, [row])
        cache.states.clear([row])

    def park(self, lane: int | None, slot: int | None) -> Outside:
        """Takes the sequence of a lane, or a slot, to the host's memory."""
        cache, row = self._at(lane, slot)
        assert cache.state is not None
        parked = park(cache.state, row)
        return Outside(parked, cache.states.park(row) if cache.states else None)

    def unpark(self, outside: Outside, lane: int | None, slot: int | None) -> None:
        """Puts a sequence back into an empty lane or slot; CapacityError with nothing changed."""
        cache, row = self._at(lane, slot)
        assert cache.state is not None
        unpark(cache.state, row, outside.parked)
        if outside.states is not None:
            self._put(cache, row, outside.states)

    def what_is_held(self, lane: int | None, slot: int | None) -> Held:
        """What a sequence holds; waits for the device."""
        cache, row = self._at(lane, slot)
        state = cache.state
        assert state is not None
        state.sync_host()
        length = state.lengths[row]
        first = state.layers[0].device
        counts = torch.cat([x.counts[row].to(first) for x in state.layers]).cpu()
        each = counts.split([x.counts.shape[1] for x in state.layers])
        stored, total = [], 0
        for layer, heads in zip(state.layers, map(Tensor.tolist, each), strict=True):
            total += sum(pages_of(n, layer.pool.page_size) for n in heads) * layer.pool.page_bytes
            stored.append(tuple(n + min(length, layer.window) for n in heads))
        return Held(tokens=length, stored=tuple(stored), bytes=total)

    def close(self) -> None:
        """Frees everything."""
        self.prefix = None
        for cache in (self.decoding, self.reading):
            cache.graph = cache.state = None
            cache.states.reset()
        del self.last

    def _at(self, lane: int | None, slot: int | None) -> tuple[SlotCache, int]:
        if lane is not None:
            return self.reading, lane
        assert slot is not None
        return self.decoding, slot

    def _put(self, cache: SlotCache, row: int, states: Sequence[dict[str, Any]]) -> None:
        if states:
            assert cache.state is not None
            cache.states.put(row, states, cache.state.batch)
