"""Breaking work off at any line, and what holds for pages then."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import kvpolicy

HOME = str(Path(kvpolicy.__file__).parent)
ROOMS = tuple(f"{HOME}/{room}/" for room in ("store", "calls", "reference"))
# What mends, and what Python does not let fail.
UNTRACED = {"unbroken", "recount", "tables", "abandon", "__del__"}


class Stop(KeyboardInterrupt):
    pass


class BreakAt:
    """Raises at the `nth` line of the store, the calls or the reference that runs inside."""

    def __init__(self, nth):
        self.left = nth

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        code = frame.f_code
        mends = UNTRACED.intersection(code.co_qualname.split("."))
        if mends or not code.co_filename.startswith(ROOMS):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Stop
        return self.trace


def check_pages(*states):
    """Each page is free or held, as often as tables name it; tables name the counted pages."""
    (pool,) = {pool for state in states for pool in state.devices.pools}
    free = pool.free[: pool.available].tolist()
    named = Counter()
    for state in states:
        for layer in state.layers:
            named.update(layer.table[layer.table > 0].tolist())
    assert {page: n for page, n in enumerate(pool.refs.tolist()) if n} == named
    assert sorted([*free, *named]) == list(range(1, pool.capacity))
