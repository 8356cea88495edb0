"""What the host knows of one sequence."""

from __future__ import annotations

import attrs


@attrs.define
class SequenceState:
    """Host numbers of one sequence of a cache.

    `length` counts its real tokens; one that is not `active` stores nothing in decode calls, until
    it is resumed or, being empty, gets a prompt.
    `evicted_at` is the length at its last eviction, `longest` the longest length of late: rings
    lost what lies `rollback` before it. `considered_at` is the length when a decode-time eviction
    was last considered. `prompt_open`: its prompt has not ended and a prompt-end eviction waits for
    it. The queries of its first `summed` tokens are in sums for good. `overshoot` is the most
    tokens of a head above `max_tokens`, `cap_evicted` the tokens dropped because a cap was
    reached. `replayed_at` is the length at the last replay.

    A number that is added here is forked, reset, saved and loaded with the others.
    """

    length: int = 0
    active: bool = True
    evicted_at: int = 0
    longest: int = 0
    considered_at: int = 0
    prompt_open: bool = False
    summed: int = 0
    overshoot: int = 0
    cap_evicted: int = 0
    replayed_at: int = 0

    def final(self, rollback: int) -> int:
        """Queries at positions before this one are never taken back: numbers hold their weights."""
        return max(self.evicted_at, max(self.length, self.longest) - rollback, 0)
