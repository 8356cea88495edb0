"""Evictions by ratio and at a gate's bytes, as rows of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...admission import WriteGate
from ...budget import Budget, Ratio, Tokens
from ...eviction import Eviction, Ranked, SageKV
from ...pipeline import CachePipeline
from ..grid.variants import OBSERVATION, SEEN, Room, Variant
from ..methods.evictions import EVICTIONS, Method

Make = Callable[[Budget], Eviction]
#: Those with a budget, where kvpress has them: all that they drop, they drop when the prompt ends.
METHODS = {name: method for name, method in EVICTIONS.items() if not method.tuned}


def evictions(
    gates: Sequence[tuple[str, WriteGate]], ratios: Sequence[float], questions: Sequence[str]
) -> list[Variant]:
    """Every eviction with parts of the context removed, and with the bytes of each gate.

    `questions` are "unseen", "seen" or both: whether the prompt that they compress has the
    question.
    """
    made = dict(METHODS)
    if gates:
        name, gate = gates[0]
        made[f"Ranked {name}"] = Method(make=lambda budget: Ranked(gate=gate, budget=budget))
    found = []
    for name, method in made.items():
        for question in questions:
            family = f"{name}{SEEN if question == 'seen' else ''}"
            sizes: list[tuple[str, str | None, float]] = [
                (f"{100 * x:.4g}% removed", None, 1 - x) for x in ratios
            ]
            sizes += [(f"(gate {gate})", f"gate {gate}", 1.0) for gate, _ in gates]
            for size, matches, keep in sizes:
                found.append(
                    Variant(
                        name=f"{family} {size}",
                        family=family,
                        build=partial(_build, method, None if matches else keep),
                        matches=matches,
                        keep=keep,
                        question_in_prompt=question == "seen",
                        tier=2,
                        prompt_only=False,
                    )
                )
    return found


def _build(method: Method, keep: float | None, room: Room) -> CachePipeline | None:
    """A part of the tokens seen, or as many whole pages as fit into a room with the window."""
    make = method.at_prompt_end
    window = window_of(make(Tokens(1 << 20)))
    if keep is not None:
        return CachePipeline(eviction=make(Ratio(round(keep, 9))), window=window)
    # Heads that hold different numbers of tokens leave half a page each.
    budget = int(room.slots - room.page / 2) if method.ragged else room.whole(window)
    if budget <= window:
        return None
    return CachePipeline(eviction=make(Tokens(budget)), window=window)


def window_of(eviction: Eviction) -> int:
    """The local window that it wants, else the smallest, so that its scores decide about the rest.

    SAGE-KV's original keeps recent tokens too: as many as SnapKV's window.
    """
    if isinstance(eviction, SageKV):
        return OBSERVATION
    return eviction.window or eviction.prefers_window or 1
