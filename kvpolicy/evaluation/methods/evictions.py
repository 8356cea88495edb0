"""Every eviction of the library by the name that people know it by, made for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs

from ...budget import AcrossLayers, Adaptive, Budget, HeadKV, LazyLayers, Pyramid, Tokens
from ...eviction import (
    GKV,
    H2O,
    RKV,
    TOVA,
    AtPromptEnd,
    CapKV,
    CriticalKV,
    DBudgetKV,
    Eviction,
    ExpectedAttention,
    FastGen,
    KeyDiff,
    Knorm,
    KVzip,
    LagKV,
    Ranked,
    SageKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
)
from ..grid.variants import OBSERVATION
from .files import FROM_FILES, Given

Make = Callable[[Budget], Eviction]


@attrs.frozen(kw_only=True)
class Method:
    """An eviction as its paper has it: `make` gives it for a budget.

    `press` gives the form that kvpress has, where that is another. `window` is the local window
    in tokens for so many slots, None the policy's own. `ragged`: heads hold different numbers of
    tokens. `tuned`: it has no budget, and its number is turned until its cache has the size.
    `unasked`: it never knows a question.
    """

    make: Make
    press: Make | None = None
    window: Callable[[float], int | None] = lambda slots: None
    ragged: bool = False
    tuned: bool = False
    unasked: bool = False

    def at_prompt_end(self, budget: Budget) -> Eviction:
        """It as kvpress has it: all that it drops, it drops when the prompt ends."""
        policy: Any = (self.press or self.make)(budget)
        if policy.when == "prompt_end":
            return policy
        return attrs.evolve(policy, when="prompt_end")


def _half(slots: float) -> int:
    return max(int(slots / 2), 1)


def _snap(budget_of: Callable[[Budget], Budget]) -> Make:
    return lambda budget: SnapKV(budget=budget_of(budget), observation=OBSERVATION)


def _lazy(budget: Budget) -> Eviction:
    recent = budget.tokens // 4 if isinstance(budget, Tokens) else 1024
    return SimLayerKV(recent=max(recent, 2))


# Names as in docs/policies.md; in its order.
EVICTIONS: Mapping[str, Method] = {
    "StreamingLLM": Method(make=lambda b: StreamingLLM(budget=b)),
    "SnapKV": Method(make=_snap(lambda b: b)),
    "AdaKV": Method(
        make=_snap(Adaptive), press=_snap(lambda b: Adaptive(b, form="window")), ragged=True
    ),
    "PyramidKV": Method(make=_snap(Pyramid), ragged=True),
    "SnapKV across layers": Method(make=_snap(AcrossLayers), ragged=True),
    "SnapKV, lazy layers": Method(make=_snap(LazyLayers), ragged=True),
    "TOVA": Method(
        make=lambda b: TOVA(budget=b), press=lambda b: TOVA(budget=b, across_heads=True)
    ),
    "H2O": Method(
        make=lambda b: H2O(budget=b), press=lambda b: H2O(budget=b, average=True), window=_half
    ),
    "SAGE-KV": Method(make=lambda b: SageKV(budget=b), window=_half),
    "KeyDiff": Method(make=lambda b: KeyDiff(budget=b)),
    "Knorm": Method(make=lambda b: Knorm(budget=b)),
    "Expected Attention": Method(make=lambda b: ExpectedAttention(budget=b)),
    "CapKV": Method(make=lambda b: CapKV(budget=b)),
    "CriticalKV": Method(
        make=lambda b: CriticalKV(ExpectedAttention(budget=b)),
        press=lambda b: CriticalKV(SnapKV(budget=b)),
    ),
    "R-KV": Method(make=lambda b: RKV(budget=b)),
    "G-KV": Method(make=lambda b: GKV(budget=b)),
    "LagKV": Method(make=lambda b: LagKV(budget=b)),
    "KVzip": Method(
        make=lambda b: KVzip(budget=Adaptive(b, floor=0)),
        window=lambda slots: 1,
        ragged=True,
        unasked=True,
    ),
    "DBudgetKV": Method(make=lambda b: DBudgetKV(), tuned=True),
    "FastGen": Method(make=lambda b: FastGen(), tuned=True),
    "SimLayerKV": Method(make=_lazy, tuned=True),
}


def evictions(given: Given) -> dict[str, Method]:
    """All of them, with those that need what is given."""
    found = dict(EVICTIONS)
    for name, gate in given.gates().items():
        found[f"Ranked by the {name}"] = Method(make=partial(_ranked, gate))
        found[f"{name} at the prompt's end"] = Method(make=partial(_at_end, gate), tuned=True)
    if (worths := given.head_worths()) is not None:
        found["HeadKV"] = Method(make=_snap(partial(HeadKV, importance=worths)), ragged=True)
    for name in FROM_FILES:
        if name in given.files:
            found[name] = Method(make=partial(given.evicting, name), window=lambda slots: 1)
    return found


def _ranked(gate: Any, budget: Budget) -> Eviction:
    return Ranked(gate=gate, budget=budget)


def _at_end(gate: Any, budget: Budget) -> Eviction:
    """DMS of kvpress: all that a gate wants, dropped when the prompt ends."""
    return AtPromptEnd(gate, generated="keep")
