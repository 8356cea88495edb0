"""The contract on the Triton backend: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CacheSpec
from tests.support.contract.cases import ADMISSIONS, EVICTIONS, SELECTIONS, Sizes, build
from tests.support.contract.driver import Run, random_cuts, stream
from tests.support.on_gpu import on_gpu

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
TRIPLES = [(a, s, e) for a in ADMISSIONS for s in SELECTIONS for e in EVICTIONS]
# Interpreted kernels take about 50 ms a call: a few of each kind, not every triple.
SOME = [
    *[(a, "quest", "none") for a in ("all", "random", "gate")],
    *[("random", s, "none") for s in ("quest_each", "quest_first", "user")],
    *[("random", "all", e) for e in ("tokens_decode", "adaptive", "cap", "at_end_gate")],
]


def run_triple(triple: tuple[str, str, str], layers: int, rows: int, decoded: int) -> None:
    spec = CacheSpec(
        layers=layers, heads=6, kv_heads=2, head_dim=16, page_size=4, interval=4, device=DEVICE
    )
    sizes = Sizes(spec, window=5)
    pipeline = build(sizes, *triple, backend="triton")
    lengths = [sizes.length + 9 * row for row in range(rows)]
    streams = [stream(spec, n + decoded, seed) for seed, n in enumerate(lengths)]
    run = Run(pipeline, spec, streams)
    for cut in random_cuts(lengths, 7, max(lengths)):
        run.prompt(cut)
    run.end_prompt()
    for _ in range(decoded):
        run.decode()
    run.check()
    run.check_effect()


@pytest.mark.parametrize("triple", SOME, ids="-".join)
def test_each_policy(triple: tuple[str, str, str]) -> None:
    run_triple(triple, layers=1, rows=1, decoded=5)


@on_gpu("triple", TRIPLES, ids="-".join)
def test_every_triple(triple: tuple[str, str, str]) -> None:
    # Of two layers a pyramid leaves the second less than selections leave out.
    run_triple(triple, layers=3, rows=3, decoded=14)


def test_single_tokens_beside_a_finished_sequence() -> None:
    """Prompt calls of one token, which read one page a head."""
    spec = CacheSpec(layers=1, heads=6, kv_heads=2, head_dim=16, page_size=4, device=DEVICE)
    pipeline = build(Sizes(spec, window=8), "all", "all", "none", backend="triton")
    run = Run(pipeline, spec, [stream(spec, n, seed=n) for n in (15, 3)])
    for step in range(15):
        run.prompt([1, 1 if step < 3 else 0])
    run.check()
