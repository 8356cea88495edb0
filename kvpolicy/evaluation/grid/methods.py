"""Every method of docs/policies.md that needs no file of its own, at equal bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from ...admission import WriteGate
from ...budget import AcrossLayers, Adaptive, Budget, LazyLayers, Pyramid, Tokens
from ...eviction import (
    GKV,
    H2O,
    RKV,
    TOVA,
    CriticalKV,
    DBudgetKV,
    Eviction,
    ExpectedAttention,
    FastGen,
    KeyDiff,
    Knorm,
    LagKV,
    QFilters,
    SageKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
)
from ...pipeline import CachePipeline
from ...selection import Quest, SelectAll, Selection, TopChannels, XAttention
from .variants import FULL, OBSERVATION, SEEN, Build, Room, Variant, matched

Evicts = Callable[[int], Eviction]  # of tokens a head, the window included
READING = " (reads)"  # what is said of a size is what a decoded token reads; nothing is freed


@attrs.frozen(kw_only=True)
class Method:
    """How an eviction is sized: `make` gives it for so many tokens a head.

    `window` is the local window in tokens for so many slots, None the policy's own; `ragged` heads
    hold different numbers of tokens, so that each leaves half a page. `tuned`: it has no budget,
    and its number is turned until its cache has the size.
    """

    make: Evicts
    window: Callable[[float], int | None] = lambda slots: None
    ragged: bool = False
    tuned: bool = False
    reads: float | None = None

    def build(self, seen: bool, room: Room) -> CachePipeline | None:
        """The pipeline for a room.

        A question that comes after the eviction needs room too, but where one goes on.
        """
        policy = self.make(1 << 20)
        goes_on = policy.when == "decode" or policy.forgets_window
        slots = room.slots - (0 if seen or goes_on else room.asked)
        near = self.window(slots)
        window = near or policy.prefers_window or 1
        own = attrs.evolve(room, slots=slots)
        tokens = int(slots - room.page / 2) if self.ragged or self.tuned else own.whole(window)
        if tokens <= window:
            return None
        selection: Selection = SelectAll()
        if self.reads is not None:
            budget = attrs.evolve(room, slots=window + self.reads * (slots - window)).whole(window)
            if budget <= window:
                return None
            selection = self.selection(budget)
        return CachePipeline(eviction=self.make(tokens), selection=selection, window=near)

    @staticmethod
    def selection(budget: int) -> Selection:
        """What reads a part of what an eviction left."""
        return Quest(budget=budget)


class _Rocket(Method):
    @staticmethod
    def selection(budget: int) -> Selection:
        return TopChannels(budget=budget, channels=16)


def _snap(budget_of: Callable[[int], Budget | int]) -> Evicts:
    return lambda tokens: SnapKV(budget=budget_of(tokens), observation=OBSERVATION)


def _half(slots: float) -> int:
    return max(int(slots / 2), 1)


# Names as in docs/policies.md; in its order.
EVICTIONS: Mapping[str, Method] = {
    "StreamingLLM": Method(make=lambda n: StreamingLLM(budget=n)),
    "SnapKV": Method(make=_snap(Tokens)),
    "AdaKV": Method(make=_snap(lambda n: Adaptive(Tokens(n))), ragged=True),
    "PyramidKV": Method(make=_snap(lambda n: Pyramid(Tokens(n))), ragged=True),
    "SnapKV across layers": Method(make=_snap(lambda n: AcrossLayers(Tokens(n))), ragged=True),
    "SnapKV, lazy layers": Method(make=_snap(lambda n: LazyLayers(Tokens(n))), ragged=True),
    "TOVA": Method(make=lambda n: TOVA(budget=n)),
    "H2O": Method(make=lambda n: H2O(budget=n), window=_half),
    "SAGE-KV": Method(make=lambda n: SageKV(budget=n), window=_half),
    "KeyDiff": Method(make=lambda n: KeyDiff(budget=n)),
    "Knorm": Method(make=lambda n: Knorm(budget=n)),
    "Expected Attention": Method(make=lambda n: ExpectedAttention(budget=n)),
    "CriticalKV": Method(make=lambda n: CriticalKV(ExpectedAttention(budget=n))),
    "R-KV": Method(make=lambda n: RKV(budget=n)),
    "G-KV": Method(make=lambda n: GKV(budget=n)),
    "LagKV": Method(make=lambda n: LagKV(budget=n)),
    "DBudgetKV": Method(make=lambda n: DBudgetKV(), tuned=True),
    "FastGen": Method(make=lambda n: FastGen(), tuned=True),
    "SimLayerKV": Method(make=lambda n: SimLayerKV(recent=max(n // 4, 2)), tuned=True),
    "SnapKV + Quest": Method(make=_snap(Tokens), reads=0.5),
    "RocketKV": _Rocket(make=_snap(Tokens), reads=0.5),
}


def method_variants(
    keeps: Sequence[float],
    window: int,
    *,
    gate: WriteGate | None = None,
    duo: str | os.PathLike[str] | None = None,
    q_filters: str | os.PathLike[str] | None = None,
) -> list[Variant]:
    """All methods at parts `keeps` of the context, full attention first.

    Evictions come twice, with and without the question. `gate` and `duo` are a write gate and the
    folder of a DuoAttention pattern, for the model, `q_filters` a file of its filters; `window`
    that of policies which have none.
    """
    evictions = dict(EVICTIONS)
    if q_filters is not None:
        evictions["Q-Filters"] = Method(
            make=lambda n: QFilters.from_pretrained(q_filters, budget=n)
        )
    found = [Variant(name=FULL, family=FULL, build=lambda room: CachePipeline(window=window))]
    for tier, keep in enumerate(keeps):
        size = f" {keep:.3g}"

        def add(family: str, build: Build, **how: Any) -> None:
            found.append(
                Variant(name=family + size, family=family, build=build, keep=keep, **how)  # noqa: B023
            )

        for family, build in matched(duo, window).items():
            if "SnapKV" not in family:
                add(family, build, tier=tier)
        if gate is not None:
            add("write gate", lambda room: CachePipeline(admission=gate), tuned=True, tier=tier)
        for family, method in evictions.items():
            for seen in (False, True):
                add(
                    family + (SEEN if seen else ""),
                    partial(method.build, seen),
                    question_in_prompt=seen,
                    tuned=method.tuned,
                    tier=2 if seen else tier,
                    prompt_only=False,
                )
        selections: dict[str, Callable[..., Any]] = {"Quest": Quest, "RocketKV's pages": _pages}
        for family, reads in selections.items():
            add(family + READING, partial(_reading, reads, window), tier=tier, prompt_only=False)
    prompt = CachePipeline(selection=XAttention(), window=window)
    found.append(Variant(name="XAttention", family="XAttention", build=lambda room: prompt))
    return found


def _pages(budget: int) -> TopChannels:
    return TopChannels(budget=budget, channels=16)


def _reading(policy: Callable[..., Any], window: int, room: Room) -> CachePipeline | None:
    """A selection that reads at most so many slots a head."""
    budget = room.whole(window)
    if budget <= window:
        return None
    return CachePipeline(selection=policy(budget=budget), window=window)
