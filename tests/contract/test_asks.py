"""The contract where attention is asked for softcaps, sinks, chunks and values of another dim."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CacheSpec
from kvpolicy.spec import LayerSizes
from tests.support.contract.cases import Sizes, build
from tests.support.contract.driver import Run, random_cuts, stream

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HEADS = {"heads": 6, "kv_heads": 2, "head_dim": 16}
LAYERS = (
    LayerSizes(**HEADS, value_dim=8, softcap=1.0, scale=1.0),
    LayerSizes(**HEADS, window=7, chunk=7),
    LayerSizes(**HEADS, value_dim=32, window=6),
)
SINKS = [torch.linspace(0, 3, 6), None, torch.full((6,), 2.0)]
PARTS = [
    ("random", "quest", "none"),
    ("all", "all", "none"),
    ("random", "quest_each", "tokens_decode"),
]


def run_parts(parts: tuple[str, str, str], backend: str, rows: int, decoded: int) -> None:
    spec = CacheSpec(
        layers=3, **HEADS, per_layer=LAYERS, page_size=4, interval=4, device=DEVICE
    )  # fmt: skip
    sizes = Sizes(spec, window=5)
    lengths = [sizes.length + 9 * row for row in range(rows)]
    streams = [stream(spec, n + decoded, seed) for seed, n in enumerate(lengths)]
    run = Run(build(sizes, *parts, backend=backend), spec, streams, sinks=SINKS)
    for cut in random_cuts(lengths, 7, max(lengths)):
        run.prompt(cut)
    run.end_prompt()
    for _ in range(decoded):
        run.decode()
    run.check()


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_reference(parts: tuple[str, str, str]) -> None:
    run_parts(parts, "reference", rows=2, decoded=9)


def test_interpreted_kernels() -> None:
    run_parts(PARTS[0], "triton", rows=1, decoded=2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_kernels(parts: tuple[str, str, str]) -> None:
    run_parts(parts, "triton", rows=3, decoded=20)
