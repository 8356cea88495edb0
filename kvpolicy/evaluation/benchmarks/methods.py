"""The library's evictions that need nothing but a budget, by the names that people know them by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...admission import WriteGate
from ...budget import Adaptive, Budget, Pyramid, Ratio, Tokens
from ...eviction import (
    GKV,
    H2O,
    RKV,
    TOVA,
    CriticalKV,
    Eviction,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    LagKV,
    Ranked,
    SageKV,
    SnapKV,
    StreamingLLM,
)
from ...pipeline import CachePipeline
from ..grid.variants import OBSERVATION, SEEN, Room, Variant

Make = Callable[[Budget], Eviction]
#: They act when the prompt ends. Budgets shared by heads are kvpress's.
METHODS: dict[str, Make] = {
    "SnapKV": lambda budget: SnapKV(budget=budget),
    "AdaKV": lambda budget: SnapKV(budget=Adaptive(budget, form="window")),
    "PyramidKV": lambda budget: SnapKV(budget=Pyramid(budget)),
    "CriticalKV": lambda budget: CriticalKV(SnapKV(budget=budget)),
    "KVzip": lambda budget: KVzip(budget=Adaptive(budget, floor=0)),
    "ExpectedAttention": lambda budget: ExpectedAttention(budget=budget),
    "KeyDiff": lambda budget: KeyDiff(budget=budget),
    "TOVA": lambda budget: TOVA(budget=budget, across_heads=True, when="prompt_end"),
    "Knorm": lambda budget: Knorm(budget=budget),
    "LagKV": lambda budget: LagKV(budget=budget),
    "H2O": lambda budget: H2O(budget=budget, average=True, when="prompt_end"),
    "StreamingLLM": lambda budget: StreamingLLM(budget=budget, when="prompt_end"),
    "SageKV": lambda budget: SageKV(budget=budget),
    "R-KV": lambda budget: RKV(budget=budget, when="prompt_end"),
    "G-KV": lambda budget: GKV(budget=budget, when="prompt_end"),
}
#: Evictions that are no row of `METHODS`, with the reason.
NOT_MEASURED = {
    "KeepAll": "full attention",
    "AtPromptEnd": "wraps an admission",
    "KVPress": "wraps a press",
    "Ranked": "ranks by a gate: a row for each gate",
    "FastKVzip": "needs a file of the model",
    "JudgeQ": "needs a file of the model",
    "QFilters": "needs a file of the model",
    "TrimKV": "needs a file of the model",
    "TriAttention": "needs statistics of the model",
    "DBudgetKV": "a threshold, no budget",
    "FastGen": "a threshold, no budget",
    "SimLayerKV": "a threshold, no budget",
}


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
        made[f"Ranked {name}"] = lambda budget: Ranked(gate=gate, budget=budget)
    found = []
    for method, make in made.items():
        for question in questions:
            family = f"{method}{SEEN if question == 'seen' else ''}"
            sizes: list[tuple[str, str | None, float]] = [
                (f"{100 * x:.4g}% removed", None, 1 - x) for x in ratios
            ]
            sizes += [(f"(gate {name})", f"gate {name}", 1.0) for name, _ in gates]
            for size, matches, keep in sizes:
                found.append(
                    Variant(
                        name=f"{family} {size}",
                        family=family,
                        build=partial(_build, make, None if matches else keep),
                        matches=matches,
                        keep=keep,
                        question_in_prompt=question == "seen",
                        tier=2,
                        prompt_only=False,
                    )
                )
    return found


def _build(make: Make, keep: float | None, room: Room) -> CachePipeline | None:
    """A part of the tokens seen, or as many whole pages as fit into a room with the window."""
    window = window_of(make(Tokens(1 << 20)))
    if keep is not None:
        return CachePipeline(eviction=make(Ratio(round(keep, 9))), window=window)
    # Heads that hold different numbers of tokens leave half a page each.
    ragged = isinstance(getattr(make(Tokens(1 << 20)), "budget", None), Adaptive | Pyramid)
    budget = int(room.slots - room.page / 2) if ragged else room.whole(window)
    if budget <= window:
        return None
    return CachePipeline(eviction=make(Tokens(budget)), window=window)


def window_of(eviction: Eviction) -> int:
    """The local window that it wants, else the smallest, so that its scores decide about the rest.

    SageKV's original keeps recent tokens too: as many as SnapKV's window.
    """
    if isinstance(eviction, SageKV):
        return OBSERVATION
    return eviction.window or eviction.prefers_window or 1
