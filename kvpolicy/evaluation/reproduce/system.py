"""Figure 8: seconds to the first token, time a token, and bytes, by the prompt's length."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.hf import attach
from ...adapters.hf.capture import Stepper
from ...pipeline import CachePipeline
from ..chart import Chart, Point
from ..finished import Finished
from . import published
from .setup import Setup

OUT_OF_MEMORY = "out of memory"
NOTES = (
    "Published: PG-19, 300 steps; the GPU is not stated. Full attention there is its sparse kernel "
    "with every token admitted.",
    "Here decode steps are captured where the device can; theirs run one kernel after another.",
)


def system(setup: Setup) -> tuple[list[Chart], int]:
    """The three panels, and how many measurements are left."""
    sizes, left = setup.sizes, 0
    ids = setup.tokenizer(setup.text, verbose=False, return_tensors="pt").input_ids
    if ids.shape[1] < max(sizes.lengths):
        raise ValueError(
            f"texts: wanted {max(sizes.lengths)} tokens or more for the longest prompt, got "
            f"{ids.shape[1]}"
        )
    parts = Finished(Path(setup.out) / "parts", setup.settings)
    panels: list[list[Point]] = [[], [], []]
    pipelines = {
        "full": CachePipeline(window=sizes.window),
        "write gate": CachePipeline(admission=setup.gate(published.SYSTEM_LAMBDA)),
    }
    for length in sizes.lengths:
        for curve, pipeline in pipelines.items():
            if time.monotonic() > setup.deadline:
                left += 1
                continue
            found = parts.of(
                f"{curve.replace(' ', '-')}-{length}",
                lambda: _measure(setup, pipeline, ids[:, :length]),  # noqa: B023
            )
            said = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
            setup.say(f"{curve}, {length} tokens: {said or found['failed']}")
            if "failed" in found:
                continue
            for panel, name in zip(panels, ("ttft", "tpot", "memory"), strict=True):
                panel.append(
                    Point(curve=curve, name=f"{length} tokens", x=length, y=found[name],
                          more={"held": found["held"]})
                )  # fmt: skip
    title = f"WG-KV, figure 8, lambda {published.SYSTEM_LAMBDA:g}"
    charts = [
        Chart(title=title, x="tokens of the prompt", y=name, notes=NOTES,
              points=[*panel, *published.system(n)])
        for n, (name, panel) in enumerate(zip(published.SYSTEM, panels, strict=True))
    ]  # fmt: skip
    return charts, left


@torch.no_grad()
def _measure(setup: Setup, pipeline: CachePipeline, ids: Tensor) -> dict[str, Any]:
    """Of one prompt `[1, N]`; what ran before it warms the kernels up."""
    model, sizes = setup.model, setup.sizes
    ids = ids.to(model.device)
    try:
        with attach(model, pipeline, compile=setup.compiled) as here:
            _read(model, here.new_cache(), ids[:, : 2 * sizes.chunk], sizes.chunk).tolist()
            cache = here.new_cache()
            began = time.perf_counter()
            token = _read(model, cache, ids, sizes.chunk)
            token.tolist()
            first = time.perf_counter() - began
            position = torch.full_like(token[:, None], cache.columns)
            warm = 4
            stepper = Stepper(model, cache, position, sizes.steps + warm)
            active = torch.ones(1, dtype=torch.bool, device=model.device)
            for step in range(warm + sizes.steps):
                if step == warm:
                    token.tolist()
                    began = time.perf_counter()
                token = stepper.step(token, active)[:, -1].argmax(-1)
            token.tolist()
            a_token = (time.perf_counter() - began) / sizes.steps
            report = cache.report()
    except torch.OutOfMemoryError:
        return {"failed": OUT_OF_MEMORY}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    heads = [x for layer in report.stored for x in layer]
    return {
        "ttft": first,
        "tpot": 1e3 * a_token,
        "memory": (weights + report.total) / 2**20 / 1000,
        "held": sum(heads) / len(heads) / report.tokens,
        "device": str(setup.made_with.get("device")),
    }


def _read(model: Any, cache: Any, ids: Tensor, chunk: int) -> Tensor:
    """Runs a prompt in equal chunks of up to `chunk` tokens; the first new token `[1]`."""
    for part in ids.tensor_split(-(-ids.shape[1] // chunk), dim=1):
        logits = model(input_ids=part, past_key_values=cache, logits_to_keep=1).logits
    cache.end_prompt()
    return logits[:, -1].argmax(-1)
