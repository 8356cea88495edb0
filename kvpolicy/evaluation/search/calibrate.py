"""Turn a policy's knob until the cache has the size that is wanted, measured on texts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...adapters.hf import attach, spec_of
from ...pipeline import CachePipeline
from ..sessions.pipeline import PipelineSession
from ..tasks.prompts import token_ids
from .knobs import knob_of


@attrs.frozen(kw_only=True)
class Size:
    """What a cache holds after a prompt, averaged over texts.

    `tokens` per head and `fraction` of the tokens seen include the local window; `bytes` are all
    of the cache's.
    """

    tokens: float
    fraction: float
    bytes: float


@attrs.frozen(kw_only=True)
class Trial:
    """One value of the knob and the cache that it gave."""

    value: float
    size: Size


@attrs.frozen(kw_only=True)
class Calibration:
    """The pipeline whose cache is nearest to the target, and all that was tried.

    `unit` ("tokens", "fraction" or "bytes") is what `target` counts; `reached` tells whether the
    size is within the tolerance.
    """

    pipeline: CachePipeline
    knob: str
    unit: str
    target: float
    reached: bool
    best: Trial
    trials: tuple[Trial, ...]


def calibrate(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    texts: Sequence[str | Sequence[int] | Tensor],
    *,
    target: str | None = None,
    tokens: float | None = None,
    bytes: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    slot: str | None = None,
    pattern: str | os.PathLike[str] | None = None,
    tolerance: float = 0.02,
    trials: int = 12,
    measured: Callable[[Trial], object] = lambda trial: None,
) -> Calibration:
    """Bisects a threshold, a sparsity or a budget over the sizes that caches report.

    Every trial reads every text as a prompt and ends it. Give one of `target`, `tokens`, `bytes`.

    Args:
        model: a model that the adapters serve, with nothing attached.
        pipeline: its admission or eviction is turned, by what its `knob` gives.
        texts: prompts: token ids `[N]`, or texts with a `tokenizer`.
        target: a part of the tokens seen, window included, such as "25%".
        tokens: tokens per head, window included.
        bytes: all bytes of one prompt's cache.
        tokenizer: of texts.
        slot: "admission" or "eviction", where both could be turned.
        pattern: folder of DuoAttention's head values.
        tolerance: how far from the target is near enough, relative to it.
        trials: the most values to try.
        measured: called with each trial.

    Raises:
        ValueError: arguments that have no meaning, or a target out of the knob's reach; the message
            names the sizes that it reaches.
    """
    unit, wanted = target_of(target, tokens, bytes)
    if trials < 2 or not texts:
        raise ValueError(f"trials, texts: wanted at least 2 and 1, got {trials} and {len(texts)}")
    prompts = [token_ids(text, tokenizer) for text in texts]
    seen = max(len(ids) for ids in prompts)
    spec = spec_of(model)
    sizes = {"layers": spec.layers, "kv_heads": spec.kv_heads}
    knob = knob_of(pipeline, seen=seen, slot=slot, pattern=pattern, **sizes)
    tried: list[Trial] = []

    def size_at(x: float) -> float:
        value = knob.at(x)
        known = next((t for t in tried if t.value == value), None)
        if known is None:
            known = Trial(value=value, size=measure(model, knob.set(value), prompts))
            tried.append(known)
            measured(known)
        return getattr(known.size, unit)

    def near(size: float) -> bool:
        return abs(size - wanted) <= tolerance * wanted

    low, high = 0.0, 1.0
    least, most = size_at(low), size_at(high)
    if not (least <= wanted <= most or near(least) or near(most)):
        raise ValueError(
            f"{unit}: wanted {wanted:g}; {knob.name} from {knob.at(low):g} to {knob.at(high):g} "
            f"gives {least:g} to {most:g}"
        )
    steps = 0
    while (
        len(tried) < trials and steps < 64 and not any(near(getattr(t.size, unit)) for t in tried)
    ):
        middle, steps = (low + high) / 2, steps + 1
        if size_at(middle) <= wanted:
            low = middle
        else:
            high = middle
    best = min(tried, key=lambda trial: abs(getattr(trial.size, unit) - wanted))
    return Calibration(
        pipeline=knob.set(best.value),
        knob=knob.name,
        unit=unit,
        target=wanted,
        reached=near(getattr(best.size, unit)),
        best=best,
        trials=tuple(tried),
    )


@torch.no_grad()
def measure(model: PreTrainedModel, pipeline: CachePipeline, prompts: Sequence[Tensor]) -> Size:
    """The mean size of the caches of prompts `[N]`, each read to its end."""
    sizes = []
    with attach(model, pipeline):
        for ids in prompts:
            session = PipelineSession(model, pipeline)
            session.prefill(ids)
            session.end_prompt()
            held = [x for layer in session.report().stored for x in layer]
            mean = sum(held) / len(held)
            sizes.append((mean, mean / len(ids), session.held_bytes()))
    means = [sum(values) / len(sizes) for values in zip(*sizes, strict=True)]
    return Size(tokens=means[0], fraction=means[1], bytes=means[2])


def target_of(target: str | None, tokens: float | None, bytes: float | None) -> tuple[str, float]:
    """The unit and the size that `calibrate`'s arguments say; raises ValueError as it does."""
    given = {"fraction": target, "tokens": tokens, "bytes": bytes}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ValueError(
            f"target, tokens, bytes: wanted exactly one, got {target!r}, {tokens!r} and {bytes!r}"
        )
    ((unit, value),) = named.items()
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
        if not match or not 0 < float(match[1]) <= 100:
            raise ValueError(f'target: wanted a percentage such as "25%", got {value!r}')
        return unit, float(match[1]) / 100
    if not value > 0:
        raise ValueError(f"{unit}: wanted a number above 0, got {value!r}")
    return unit, float(value)
