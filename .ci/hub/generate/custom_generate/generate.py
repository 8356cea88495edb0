"""`generate` of any served model with its KV cache admitted, selected and evicted by kvpolicy."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from kvpolicy import CachePipeline, Quest, Ratio, Report, SnapKV, WriteGate, attach

Gate = str | tuple[str, str]


def generate(
    model: Any,
    *,
    pipeline: CachePipeline | None = None,
    gate: Gate | None = None,
    quest: int | None = None,
    snapkv: int | float | None = None,
    report: Callable[[Report], object] | None = None,
    **arguments: Any,
) -> Any:
    """transformers' generate while a pipeline is attached to `model`.

    Args:
        model: one that `kvpolicy.attach` serves.
        pipeline: what to attach; the next three make one. Without any, SnapKV keeps half.
        gate: admits by a write gate: a name of `kvpolicy.pretrained`, a file, or a hub repository
            and the name of a file in it.
        quest: tokens that a head reads while decoding.
        snapkv: tokens that a head keeps of the prompt, or the fraction of it as a float.
        report: called with what took effect, such as `print`.
        arguments: those of generate.

    Returns:
        What generate returns.
    """
    if pipeline is None:
        pipeline = _pipeline(gate, quest, snapkv)
    elif (gate, quest, snapkv) != (None, None, None):
        raise ValueError("pipeline: wanted it alone, or gate, quest and snapkv without it")
    # A model that was loaded with this file has it as its own generate, which must not be entered
    # again from inside.
    ours = vars(model).pop("generate", None)
    try:
        with attach(model, pipeline) as attached:
            output = model.generate(**arguments)
            given = arguments.get("past_key_values")
            if report is not None:
                report(attached.last_report() if given is None else given.report())
    finally:
        if ours is not None:
            model.generate = ours
    return output


def _pipeline(gate: Gate | None, quest: int | None, snapkv: int | float | None) -> CachePipeline:
    if (gate, quest, snapkv) == (None, None, None):
        snapkv = 0.5
    parts: dict[str, Any] = {}
    if gate is not None:
        parts["admission"] = _gate(gate)
    if quest is not None:
        parts["selection"] = Quest(budget=quest)
    if snapkv is not None:
        budget = Ratio(snapkv) if isinstance(snapkv, float) else snapkv
        parts["eviction"] = SnapKV(budget=budget)
    return CachePipeline(**parts)


@lru_cache(maxsize=4)
def _gate(gate: Gate) -> WriteGate:
    return WriteGate.from_pretrained(*([gate] if isinstance(gate, str) else gate))
