"""Which compositions are compared, at which cache sizes, and in which order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import attrs

from ...admission import DuoAttention, LocalAttention, RandomGate, WriteGate
from ...eviction import SnapKV
from ...pipeline import CachePipeline
from ...selection import Quest
from ..tasks.task import Task

FULL = "full"
SINKS, OBSERVATION = 4, 32
SEEN = ", question seen"


@attrs.frozen
class Room:
    """What a cache may hold: `slots` of the `seen` tokens per head, window included.

    Slots are places in the window and in pages of `page` tokens, so that equal slots are equal
    bytes. `asked` of the tokens seen came after the context.
    """

    slots: float
    seen: float
    asked: float = 0.0
    page: int = 16

    def paged(self, tokens: float) -> float:
        """Slots of the pages that so many tokens take."""
        return -(-tokens // self.page) * self.page

    def whole(self, window: int) -> int:
        """The window and the whole pages within the slots."""
        return window + int(self.slots - window) // self.page * self.page


Build = Callable[[Room], CachePipeline | None]


@attrs.frozen(kw_only=True)
class Variant:
    """A composition of one family at one cache size.

    `build` makes its pipeline for a room; None says that the family cannot be that small. The room
    is as many bytes as the variant named `matches` took, or else the fraction `keep` of the
    context. Without `question_in_prompt` the prompt ends before the question, so that an eviction
    does not know it. `tier`: 0 admissions, 1 the first budget of selections and evictions, 2 the
    rest. `prompt_only`: all it does happens in prompts, so that loss can be measured there.
    `tuned`: the number that its policy turns is searched until the cache has the room's size.
    """

    name: str
    family: str
    build: Build
    matches: str | None = None
    keep: float = 1.0
    question_in_prompt: bool = True
    tier: int = 0
    prompt_only: bool = True
    tuned: bool = False


@attrs.frozen(kw_only=True)
class Cell:
    """One variant on one task at one length."""

    task: Task
    length: int
    variant: Variant

    @property
    def key(self) -> tuple[str, int, str]:
        """That of its result."""
        return self.task.name, self.length, self.variant.name


def variants(
    gates: Sequence[tuple[str, WriteGate]],
    duo: str | os.PathLike[str] | None,
    keeps: Sequence[float],
    budgets: Sequence[float],
    window: int,
) -> list[Variant]:
    """All variants; those of a size come after the one whose size they match.

    Args:
        gates: names and gates, the largest cache first; each sets a size.
        duo: folder of a DuoAttention pattern.
        keeps: fractions of tokens that set the sizes where there is no gate.
        budgets: fractions of the context that selections read and evictions leave; the first
            matters most.
        window: local window of the families that have none of their own.
    """
    found = [Variant(name=FULL, family=FULL, build=lambda room: CachePipeline(window=window))]
    found += [
        Variant(name=f"gate {n}", family="write gate", build=partial(_gated, g)) for n, g in gates
    ]
    sizes: list[tuple[str, str | None, float]] = [
        (f"(gate {name})", f"gate {name}", 1.0) for name, _ in gates
    ]
    for name, matches, keep in sizes or [(f"{keep:.0%}", None, keep) for keep in keeps]:
        for family, build in matched(duo, window).items():
            evicts = family.startswith("SnapKV")
            found.append(
                Variant(
                    name=f"{family} {name}",
                    family=family,
                    build=build,
                    matches=matches,
                    keep=keep,
                    question_in_prompt=family != "SnapKV",
                    tier=2 if family.endswith(SEEN) else 0,
                    prompt_only=not evicts,
                )
            )
    for at, budget in enumerate(budgets):
        found += _budgeted(gates[0] if gates else None, budget, window, 2 if at else 1)
    return found


def own(name: str, pipeline: CachePipeline) -> Variant:
    """A pipeline of the user's own, as large as it is."""
    neutral = pipeline.selection.neutral and pipeline.eviction.neutral
    return Variant(name=name, family=name, build=lambda room: pipeline, prompt_only=neutral)


def cells(tasks: Sequence[Task], lengths: Sequence[int], rows: Sequence[Variant]) -> list[Cell]:
    """All cells, the most informative first.

    Core tasks at 2048 and 4096 tokens with every admission at equal bytes; at 4096 and 8192 with
    the first budget, at 8192 with admissions; loss; other admissions; the rest.
    """

    def rank(cell: Cell) -> tuple[int, ...]:
        core, tier = cell.task.core, cell.variant.tier
        if core and cell.length in (2048, 4096) and tier == 0:
            order = 0
        elif core and cell.length in (4096, 8192) and tier < 2:
            order = 1
        elif not cell.task.questions:
            order = 2
        else:
            order = 3 if tier == 0 else 4
        places = lengths.index(cell.length), tasks.index(cell.task), rows.index(cell.variant)
        return (order, *places)

    found = [
        Cell(task=task, length=length, variant=row)
        for task in tasks
        for length in lengths
        for row in rows
        if task.questions or row.prompt_only
    ]
    return sorted(found, key=rank)


def _gated(gate: WriteGate, room: Room) -> CachePipeline:
    return CachePipeline(admission=gate)


def _of(gate: WriteGate | None, window: int | None = None, **policies: object) -> CachePipeline:
    """A gate's pipeline, or one of `window` that admits everything."""
    if gate is None:
        return CachePipeline(window=window, **policies)  # type: ignore[arg-type]
    return CachePipeline(admission=gate, **policies)  # type: ignore[arg-type]


def matched(duo: str | os.PathLike[str] | None, window: int) -> dict[str, Build]:
    """The families that can be made to take the bytes that another one takes."""

    def local(room: Room) -> CachePipeline | None:
        # The sinks take a page. Few window sizes, because kernels are compiled for each.
        near = int(room.paged(room.slots)) - room.page
        kept = LocalAttention(window=max(near, 1), sinks=SINKS)
        return CachePipeline(admission=kept) if near > 0 else None

    def random(room: Room) -> CachePipeline | None:
        # A head's last page is half full on average.
        far = (room.slots - window - room.page / 2) / (room.seen - window)
        if not 0 < far <= 1:
            return None
        return CachePipeline(admission=RandomGate(sparsity=1 - far), window=window)

    def heads(room: Room) -> CachePipeline | None:
        assert duo is not None
        some = DuoAttention.from_pretrained(duo, sparsity=1.0)
        least = room.paged(some.sinks) + some.window
        most = room.paged(room.seen - some.window) + some.window
        full = (room.slots - least) / (most - least)
        if not 0 < full <= 1:
            return None
        return CachePipeline(admission=DuoAttention.from_pretrained(duo, sparsity=1 - full))

    def unseen(room: Room) -> CachePipeline | None:
        return _capped(None, window, attrs.evolve(room, slots=room.slots - room.asked))

    learned: dict[str, Build] = {} if duo is None else {"DuoAttention": heads}
    capped = partial(_capped, None, window)
    return {"local": local, **learned, "random": random, "SnapKV": unseen, f"SnapKV{SEEN}": capped}


def _budgeted(
    gate: tuple[str, WriteGate] | None, budget: float, window: int, tier: int
) -> list[Variant]:
    """Selections and evictions of a fraction of the context, alone and behind a gate."""
    found = []
    for name, policy in [("", None), *([] if gate is None else [gate])]:
        near = window if policy is None else policy.window or window
        kinds = {
            "Quest": (_reading, True, tier),
            "SnapKV": (_capped, False, tier),
            f"SnapKV{SEEN}": (_capped, True, 2),
            "Quest + SnapKV": (_both, False, 2),
        }
        for kind, (build, knows, order) in kinds.items():
            found.append(
                Variant(
                    name=f"{f'gate {name} + ' if name else ''}{kind} at {budget:.3g}",
                    family=f"{'gate + ' if name else ''}{kind}"
                    f"{'' if kind == 'Quest' else ' at a cap'}",
                    build=partial(build, policy, near),
                    keep=budget,
                    question_in_prompt=knows,
                    tier=order,
                    prompt_only=False,
                )
            )
    return found


def _reading(gate: WriteGate | None, window: int, room: Room) -> CachePipeline | None:
    """Quest that reads at most so many slots a head."""
    budget = room.whole(window)
    return _of(gate, window, selection=Quest(budget=budget)) if budget > window else None


def _capped(gate: WriteGate | None, window: int, room: Room) -> CachePipeline | None:
    """SnapKV with at most so many slots a head."""
    budget = room.whole(window)
    if budget <= window:
        return None
    eviction = SnapKV(budget=budget, observation=min(OBSERVATION, window))
    return _of(gate, window, eviction=eviction)


def _both(gate: WriteGate | None, window: int, room: Room) -> CachePipeline | None:
    capped = _capped(gate, window, room)
    return capped and attrs.evolve(capped, selection=Quest(budget=room.whole(window)))
