"""The one number of a pipeline's policy that decides how much a cache holds."""

from __future__ import annotations

import os

import attrs

from ..._knob import Knob
from ...pipeline import CachePipeline

SLOTS = ("admission", "eviction")


def knob_of(
    pipeline: CachePipeline,
    *,
    seen: int,
    layers: int,
    kv_heads: int,
    slot: str | None = None,
    pattern: str | os.PathLike[str] | None = None,
) -> Knob[CachePipeline]:
    """The knob of a pipeline's policy: what its `knob` method gives.

    Args:
        pipeline: its admission or eviction can be turned.
        seen: tokens of the longest text, which bound a budget.
        layers: layers of the model.
        kv_heads: KV heads of a layer.
        slot: "admission" or "eviction", where both could be turned.
        pattern: folder of DuoAttention's head values, which a binarised pattern has lost.

    Raises:
        ValueError: there is no knob, or there are two and `slot` names none.
    """
    if slot is not None and slot not in SLOTS:
        raise ValueError(f"slot: wanted one of {', '.join(SLOTS)}, got {slot!r}")
    found: dict[str, Knob[CachePipeline]] = {}
    if slot != "eviction" and (admission := pipeline.admission.knob(pattern)) is not None:
        found["admission"] = admission.map(lambda p: attrs.evolve(pipeline, admission=p))
    sizes = {"window": pipeline.window, "seen": seen, "layers": layers, "kv_heads": kv_heads}
    if slot != "admission" and (eviction := pipeline.eviction.knob(**sizes)) is not None:
        found["eviction"] = eviction.map(lambda p: attrs.evolve(pipeline, eviction=p))
    if len(found) > 1:
        raise ValueError("slot: admission and eviction can both be turned; name one of them")
    if not found:
        policies = ", ".join(type(getattr(pipeline, name)).__name__ for name in SLOTS)
        raise ValueError(
            f"pipeline: wanted a policy with a knob{f' as its {slot}' if slot else ''} (WriteGate, "
            f"RandomGate, DuoAttention, an eviction with a budget, or one of yours whose `knob` "
            f"gives one), got {policies}"
        )
    return next(iter(found.values()))
