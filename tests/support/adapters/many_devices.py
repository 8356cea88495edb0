"""A model on one device beside the same on two, and pipelines of every kind for it."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from kvpolicy import (
    AcrossLayers,
    Adaptive,
    CachePipeline,
    CriticalKV,
    ExpectedAttention,
    Quest,
    SnapKV,
    Tokens,
    TotalCap,
    XAttention,
    per_layer,
)
from tests.support.adapters.models import gate

LAYERS = 4
DECODE = {"observation": 4, "when": "decode"}
PIPELINES = {
    "gate": CachePipeline(admission=gate(LAYERS)),
    "quest": CachePipeline(selection=Quest(budget=13), window=5),
    "snapkv": CachePipeline(eviction=SnapKV(budget=14, observation=4), window=5),
    "total cap": CachePipeline(eviction=SnapKV(budget=TotalCap(tokens=80), **DECODE), window=5),
    "adaptive": CachePipeline(
        admission=gate(LAYERS), selection=Quest(budget=9, group="each"),
        eviction=SnapKV(budget=Adaptive(Tokens(14)), **DECODE),
    ),
    "across layers": CachePipeline(
        eviction=SnapKV(budget=AcrossLayers(Tokens(14)), **DECODE), window=5
    ),
    "expected": CachePipeline(eviction=ExpectedAttention(budget=14, when="decode"), window=5),
    "critical": CachePipeline(eviction=CriticalKV(SnapKV(budget=14, observation=4)), window=5),
    "tiles": CachePipeline(
        selection=XAttention(threshold=0.6, stride=2, tile=4),
        eviction=per_layer(SnapKV(budget=14, observation=4), {0: SnapKV(budget=9, observation=3)}),
        window=5,
    ),
}  # fmt: skip


@attrs.frozen
class Pair:
    """A model on one device, and the same on two, which runs `inside` and takes ids on `first`."""

    whole: Any
    parts: Any
    first: torch.device
    inside: Any

    def both(self, run):
        """What `run(model, device)` gives for each."""
        found = [run(self.whole, self.whole.device)]
        with self.inside():
            return [*found, run(self.parts, self.first)]


def dispatched(model, devices, offloads):
    """Half of the layers on each device by accelerate; `offloads` leaves the embeddings behind."""
    from accelerate import dispatch_model

    first, second = devices
    places = {"model.embed_tokens": "cpu" if offloads else first, "model.rotary_emb": first}
    places |= {f"model.layers.{n}": devices[2 * n // LAYERS] for n in range(LAYERS)}
    return dispatch_model(
        model, places | {"model.norm": second, "lm_head": second}, main_device=first,
        skip_keys=model._skip_keys_device_placement,
    )  # fmt: skip
