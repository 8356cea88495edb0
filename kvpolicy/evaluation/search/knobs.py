"""The one number of a policy that decides how much a cache holds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import attrs

from ...admission import DuoAttention, RandomGate, WriteGate
from ...budget import Adaptive, Budget, Pyramid, Ratio, Tokens, TotalCap
from ...pipeline import CachePipeline

SLOTS = ("admission", "eviction")
_STEEPEST = 12.0  # thresholds run over the sigmoid of -12 to 12


@attrs.frozen(kw_only=True)
class Knob:
    """A number to turn: `at(x)` for x in [0, 1] is its value, and the cache never shrinks with x.

    `set(value)` is the pipeline with that value.
    """

    name: str
    at: Callable[[float], float]
    set: Callable[[float], CachePipeline]


def knob_of(
    pipeline: CachePipeline,
    *,
    seen: int,
    heads: int,
    slot: str | None = None,
    pattern: str | os.PathLike[str] | None = None,
) -> Knob:
    """The knob of a pipeline's policy.

    Args:
        pipeline: its WriteGate has a threshold, its RandomGate or DuoAttention a sparsity, its
            eviction a budget.
        seen: tokens of the longest text, which bound a budget.
        heads: KV heads of all layers, which bound a cap on them together.
        slot: "admission" or "eviction", where both could be turned.
        pattern: folder of DuoAttention's head values, which a binarised pattern has lost.

    Raises:
        ValueError: there is no knob, or there are two and `slot` names none.
    """
    knobs = {
        "admission": _admission(pipeline, pattern),
        "eviction": _eviction(pipeline, seen, heads),
    }
    found = {name: knob for name, knob in knobs.items() if knob is not None}
    if slot is not None and slot not in SLOTS:
        raise ValueError(f"slot: wanted one of {', '.join(SLOTS)}, got {slot!r}")
    if slot is None and len(found) > 1:
        raise ValueError("slot: admission and eviction can both be turned; name one of them")
    if not found or (slot is not None and slot not in found):
        policies = ", ".join(type(getattr(pipeline, name)).__name__ for name in SLOTS)
        raise ValueError(
            f"pipeline: wanted WriteGate, RandomGate, DuoAttention or an eviction with a budget"
            f"{f' as its {slot}' if slot else ''}, got {policies}"
        )
    return found[slot] if slot is not None else next(iter(found.values()))


def _admission(pipeline: CachePipeline, pattern: str | os.PathLike[str] | None) -> Knob | None:
    policy = pipeline.admission
    if isinstance(policy, WriteGate):
        return Knob(
            name="threshold",
            at=_threshold,
            set=lambda x: attrs.evolve(pipeline, admission=attrs.evolve(policy, threshold=x)),
        )
    if isinstance(policy, RandomGate):
        return Knob(
            name="sparsity",
            at=lambda x: 1 - x,
            set=lambda x: attrs.evolve(pipeline, admission=attrs.evolve(policy, sparsity=x)),
        )
    if isinstance(policy, DuoAttention):
        if pattern is None:
            raise ValueError("pattern: DuoAttention wants the folder of its head values, got None")
        return Knob(
            name="sparsity",
            at=lambda x: 1 - x,
            set=lambda x: attrs.evolve(
                pipeline,
                admission=DuoAttention.from_pretrained(
                    pattern, sparsity=x, sinks=policy.sinks, window=policy.window
                ),
            ),
        )
    return None


def _eviction(pipeline: CachePipeline, seen: int, heads: int) -> Knob | None:
    budget = pipeline.eviction.budget
    if budget is None:
        return None
    low, high, whole = _range(budget, pipeline.window + 1, seen, heads)

    def at(x: float) -> float:
        value = low + (high - low) * x
        return round(value) if whole else value

    def put(value: float) -> CachePipeline:
        eviction = attrs.evolve(pipeline.eviction, budget=_with(budget, value))  # type: ignore[misc]
        return attrs.evolve(pipeline, eviction=eviction)

    return Knob(name="budget", at=at, set=put)


def _threshold(x: float) -> float:
    """1 at 0, 0 at 1, and even steps of the logit between."""
    if x in (0, 1):
        return float(1 - x)
    return 1 / (1 + math.exp(_STEEPEST * (2 * x - 1)))


def _range(budget: Budget, least: int, seen: int, heads: int) -> tuple[float, float, bool]:
    """Smallest and largest value of a budget, and whether it is a whole number."""
    if isinstance(budget, Adaptive | Pyramid):
        return _range(budget.base, least, seen, heads)
    if isinstance(budget, Tokens):
        return least, max(seen, least), True
    if isinstance(budget, Ratio):
        return min(least / seen, 1.0), 1.0, False
    if isinstance(budget, TotalCap):
        return 1, seen * heads, True
    raise ValueError(f"budget: wanted a budget of this library, got {type(budget).__name__}")


def _with(budget: Budget, value: float) -> Budget:
    if isinstance(budget, Adaptive | Pyramid):
        return attrs.evolve(budget, base=_with(budget.base, value))
    if isinstance(budget, Ratio):
        return Ratio(value)
    if isinstance(budget, TotalCap):
        return attrs.evolve(budget, tokens=int(value))
    return Tokens(int(value))
