"""Every method of docs/policies.md at equal bytes, as rows of the grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs

from ...budget import Tokens
from ...eviction import SnapKV
from ...pipeline import CachePipeline
from ...selection import (
    FlexPrefill,
    Quest,
    SelectAll,
    Selection,
    TopChannels,
    VerticalSlash,
    XAttention,
)
from ..methods.evictions import Method, evictions
from ..methods.files import Given
from .variants import FULL, OBSERVATION, SEEN, Build, Room, Variant, matched

READING = " (reads)"  # what is said of a size is what a decoded token reads; nothing is freed
Reader = Callable[[int], Selection]  # of tokens a head, the window included


def _pages(budget: int) -> Selection:
    return TopChannels(budget=budget, channels=16)


def _quest(budget: int) -> Selection:
    return Quest(budget=budget)


def _wide(budget: Any) -> SnapKV:
    """RocketKV's first stage."""
    return SnapKV(budget=budget, observation=OBSERVATION, kernel=63, pooling="max")


#: An eviction, and what reads half of what it leaves.
RECIPES: dict[str, tuple[Method, Reader]] = {
    "SnapKV + Quest": (
        Method(make=lambda b: SnapKV(budget=b, observation=OBSERVATION)),
        _quest,
    ),
    "RocketKV": (Method(make=_wide), _pages),
}
#: Selections of decoded tokens.
READERS: dict[str, Reader] = {"Quest": _quest, "RocketKV's pages": _pages}
#: Selections while prefilling, as their papers have them; a pattern's columns and diagonals are
#: those parts of the context that 1000 and 6096 are of 32768 tokens.
PROMPTS: dict[str, Callable[[float], Selection]] = {
    "XAttention": lambda seen: XAttention(),
    "FlexPrefill": lambda seen: FlexPrefill(),
    "Vertical-slash": lambda seen: VerticalSlash(
        vertical=round(seen * 1000 / 32768), slash=round(seen * 6096 / 32768)
    ),
}


def method_variants(keeps: Sequence[float], window: int, given: Given) -> list[Variant]:
    """All methods at parts `keeps` of the context, full attention first.

    Evictions come twice, with and without the question. `window` is that of policies which have
    none.
    """
    found = [Variant(name=FULL, family=FULL, build=lambda room: CachePipeline(window=window))]
    for tier, keep in enumerate(keeps):
        for family, build, how in _sized(window, given):
            seen = how.pop("seen", False)
            found.append(
                Variant(
                    name=f"{family} {keep:.3g}",
                    family=family,
                    build=build,
                    keep=keep,
                    tier=2 if seen else tier,
                    **how,
                )
            )
    found += [
        Variant(
            name=name,
            family=name,
            build=partial(_prefilling, reads, window),
            # Those that decide by a prompt's last queries take it in one call.
            question_in_prompt=not reads(1 << 20).whole_prompt,
            prompt_only=not reads(1 << 20).whole_prompt,
        )
        for name, reads in PROMPTS.items()
    ]
    return found


def _sized(window: int, given: Given) -> list[tuple[str, Build, dict[str, Any]]]:
    """Families that have a size, with their builds and what else a variant says of them."""
    found: list[tuple[str, Build, dict[str, Any]]] = [
        (family, build, {})
        for family, build in matched(given.duo, window).items()
        if "SnapKV" not in family
    ]
    for name, gate in given.gates().items():
        found.append((name, partial(_gated, gate), {"tuned": True}))
    whole: dict[str, tuple[Method, Reader | None]] = {
        name: (method, None) for name, method in evictions(given).items()
    }
    for family, (method, reader) in (whole | RECIPES).items():
        for seen in (False, True):
            if seen and method.unasked:
                continue
            how = {
                "question_in_prompt": seen,
                "seen": seen,
                "tuned": method.tuned,
                "prompt_only": False,
            }
            build = partial(_evicting, method, reader, seen)
            found.append((family + (SEEN if seen else ""), build, how))
    for family, reads in READERS.items():
        found.append((family + READING, partial(_reading, reads, window), {"prompt_only": False}))
    return found


def _gated(gate: Any, room: Room) -> CachePipeline:
    return CachePipeline(admission=gate)


def _evicting(
    method: Method, reader: Reader | None, seen: bool, room: Room
) -> CachePipeline | None:
    """An eviction that fills a room.

    A question that comes after the eviction needs room too, but where one goes on.
    """
    policy = method.make(Tokens(1 << 20))
    goes_on = policy.when == "decode" or policy.forgets_window
    slots = room.slots - (0 if seen or goes_on else room.asked)
    near = policy.window or method.window(slots)
    window = near or policy.prefers_window or 1
    own = attrs.evolve(room, slots=slots)
    # Heads that hold different numbers of tokens leave half a page each.
    ragged = method.ragged or method.tuned
    tokens = int(slots - room.page / 2) if ragged else own.whole(window)
    if tokens <= window:
        return None
    selection: Selection = SelectAll()
    if reader is not None:
        budget = attrs.evolve(room, slots=window + (slots - window) / 2).whole(window)
        if budget <= window:
            return None
        selection = reader(budget)
    return CachePipeline(eviction=method.make(Tokens(tokens)), selection=selection, window=near)


def _reading(reads: Reader, window: int, room: Room) -> CachePipeline | None:
    """A selection that reads at most so many slots a head."""
    budget = room.whole(window)
    return CachePipeline(selection=reads(budget), window=window) if budget > window else None


def _prefilling(reads: Callable[[float], Selection], window: int, room: Room) -> CachePipeline:
    return CachePipeline(selection=reads(room.seen), window=window)
