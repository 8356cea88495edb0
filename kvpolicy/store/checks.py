"""Checks of what callers hand to the store; none of them waits for a device."""

from __future__ import annotations

from .._arguments import check_kind, rows_below
from .._fields import check_int
from ..errors import PhaseError
from .state import CacheState


def check_state(state: CacheState, name: str = "state") -> None:
    """Raises TypeError for anything but a cache's state."""
    if not isinstance(state, CacheState):
        holds = isinstance(getattr(state, "state", None), CacheState)
        hint = "write cache.state" if holds else ""
        check_kind(name, state, CacheState, "a CacheState, as pipeline.init makes it", hint)


def check_idle(state: CacheState, what: str) -> None:
    """Raises PhaseError where `what` would change sequences that somebody counts on."""
    if state.call is not None:
        raise PhaseError(f"{what}: a call is in flight; commit or abort it first")
    if state.looks_back is not None:
        raise PhaseError(f"{what}: the fork of a replay keeps its sequences until the replay ends")


def check_row(state: CacheState, name: str, row: int) -> None:
    """Raises unless `row` is a sequence of the cache."""
    check_int(name, row, 0)
    rows_below(name, [row], state.batch)
