"""Which compositions are compared, at which cache sizes, and in which order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import attrs

from ..admission import DuoAttention, LocalAttention, RandomGate, WriteGate
from ..eviction import SnapKV
from ..pipeline import CachePipeline
from ..selection import Quest

FULL, LOSS = "full", "loss"
SINKS, OBSERVATION = 4, 32
CORE_TASKS = ("eight needles", "copy", "eight facts")
CORE_LENGTHS = (2048, 4096)


@attrs.frozen
class Room:
    """What a cache may hold: `tokens` of the `seen` ones per head, window included.

    `asked` of the tokens seen came after the context.
    """

    tokens: float
    seen: float
    asked: float = 0.0


@attrs.frozen(kw_only=True)
class Variant:
    """A composition of one family at one cache size.

    `build` makes its pipeline for a room; None says that the family cannot be that small. The room
    is what the variant named `matches` held, or else the fraction `keep` of all tokens. Without
    `question_in_prompt` the prompt ends before the question, so that an eviction does not know it.
    """

    name: str
    family: str
    build: Callable[[Room], CachePipeline | None]
    matches: str | None = None
    keep: float = 1.0
    question_in_prompt: bool = True
    core: bool = True
    prompt_only: bool = True  # all it does happens in prompts, so that loss can be measured there


@attrs.frozen(kw_only=True)
class Cell:
    """One variant on one task at one length."""

    task: str
    length: int
    variant: Variant

    @property
    def key(self) -> tuple[str, int, str]:
        return self.task, self.length, self.variant.name


def variants(
    gates: Sequence[tuple[str, WriteGate]],
    duo: str | os.PathLike[str] | None,
    keeps: Sequence[float],
    window: int,
) -> list[Variant]:
    """All variants; those of a size come after the one whose size they match.

    Args:
        gates: names and gates, the largest cache first; each sets a size.
        duo: folder of a DuoAttention pattern.
        keeps: fractions of tokens that set the sizes where there is no gate.
        window: local window of the families that have none of their own.
    """
    found = [Variant(name=FULL, family=FULL, build=lambda room: CachePipeline(window=window))]
    sizes: list[tuple[str, str | None, float]]
    if gates:
        sizes = [(f"(gate {name})", f"gate {name}", 1.0) for name, _ in gates]
    else:
        sizes = [(f"{keep:.0%}", None, keep) for keep in keeps]
    found += [Variant(name=f"gate {n}", family="write gate", build=_fixed(g)) for n, g in gates]
    for name, matches, keep in sizes:
        for family, build in _matched(duo, window).items():
            found.append(
                Variant(
                    name=f"{family} {name}",
                    family=family,
                    build=build,
                    matches=matches,
                    keep=keep,
                    question_in_prompt=family != "SnapKV",
                    core=family in ("local", "random", "DuoAttention"),
                    prompt_only=family in ("local", "random", "DuoAttention"),
                )
            )
    if gates:
        found += _compositions(gates, found[-1].matches, window)
    return found


def cells(tasks: Sequence[str], lengths: Sequence[int], rows: Sequence[Variant]) -> list[Cell]:
    """All cells, the most informative first."""

    def rank(cell: Cell) -> tuple[int, ...]:
        known = cell.task in CORE_TASKS and cell.length in CORE_LENGTHS
        tier = 0 if known and cell.variant.core else 1 if known or cell.task == LOSS else 2
        return (
            tier,
            tasks.index(cell.task),
            lengths.index(cell.length),
            rows.index(cell.variant),
        )

    found = [
        Cell(task=task, length=length, variant=row)
        for task in tasks
        for length in lengths
        for row in rows
        if task != LOSS or row.prompt_only
    ]
    return sorted(found, key=rank)


def _fixed(gate: WriteGate) -> Callable[[Room], CachePipeline]:
    return lambda room: CachePipeline(admission=gate)


def _matched(
    duo: str | os.PathLike[str] | None, window: int
) -> dict[str, Callable[[Room], CachePipeline | None]]:
    """The families that can be made to hold what another one holds."""

    def local(room: Room) -> CachePipeline | None:
        near = round(room.tokens) - SINKS
        return (
            CachePipeline(admission=LocalAttention(window=near, sinks=SINKS)) if near > 0 else None
        )

    def random(room: Room) -> CachePipeline | None:
        far = (room.tokens - window) / (room.seen - window)
        if not 0 < far <= 1:
            return None
        return CachePipeline(admission=RandomGate(sparsity=1 - far), window=window)

    def heads(room: Room) -> CachePipeline | None:
        assert duo is not None
        some = DuoAttention.from_pretrained(duo, sparsity=1.0)
        least = some.sinks + some.window
        full = (room.tokens - least) / (room.seen - least)
        if not 0 < full <= 1:
            return None
        return CachePipeline(admission=DuoAttention.from_pretrained(duo, sparsity=1 - full))

    def before_question(room: Room) -> CachePipeline | None:
        return snapkv(Room(room.tokens - room.asked, room.seen))

    def snapkv(room: Room) -> CachePipeline | None:
        budget = round(room.tokens)
        if budget <= window:
            return None
        return CachePipeline(
            window=window, eviction=SnapKV(budget=budget, observation=min(OBSERVATION, window))
        )

    def quest(room: Room) -> CachePipeline | None:
        budget = round(room.tokens)
        return (
            CachePipeline(window=window, selection=Quest(budget=budget))
            if budget > window
            else None
        )

    found: dict[str, Callable[[Room], CachePipeline | None]] = {"local": local}
    if duo is not None:
        found["DuoAttention"] = heads
    found |= {
        "random": random,
        "SnapKV, question seen": snapkv,
        "SnapKV": before_question,
        "Quest": quest,
    }
    return found


def _compositions(
    gates: Sequence[tuple[str, WriteGate]], matches: str | None, window: int
) -> list[Variant]:
    """The largest gate with a selection, an eviction and both, at the smallest gate's size."""
    name, gate = gates[0]

    def build(selects: bool, evicts: bool) -> Callable[[Room], CachePipeline | None]:
        def pipeline(room: Room) -> CachePipeline | None:
            budget = round(room.tokens)
            if budget <= window:
                return None
            parts: dict[str, Quest | SnapKV] = {}
            if selects:
                parts["selection"] = Quest(budget=budget)
            if evicts:
                observation = min(OBSERVATION, window)
                parts["eviction"] = SnapKV(budget=budget, observation=observation)
            return CachePipeline(admission=gate, **parts)  # type: ignore[arg-type]

        return pipeline

    kinds = {"Quest": (True, False), "SnapKV": (False, True), "Quest + SnapKV": (True, True)}
    return [
        Variant(
            name=f"gate {name} + {what}{', question seen' if evicts else ''}",
            family="composition, question seen" if evicts else "composition",
            build=build(selects, evicts),
            matches=matches,
            core=False,
            prompt_only=False,
        )
        for what, (selects, evicts) in kinds.items()
    ]
