"""The report's tokens read under a selection are those that the last decoded token read."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CacheSpec
from tests.support.contract.cases import SELECTIONS, Sizes, build
from tests.support.contract.driver import Run, feed, streams_of


@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "all"])
def test_what_the_last_token_read(selection):
    spec = CacheSpec(layers=2, heads=6, kv_heads=2, head_dim=8, page_size=4, dtype=torch.float64)
    sizes = Sizes(spec, window=6)
    rows = [sizes.length, sizes.length + 5]
    run = Run(build(sizes, "random", selection), spec, streams_of(sizes, rows, 1, seed=2))
    feed(run, rows, 2, 30)
    run.decode()
    read = run.pipeline.report(run.state).read
    for layer, found in enumerate(read):
        oracles = [x[layer] for x in run.oracles]
        each = [sum(min(o.n, o.W) + len(o.read[h]) for o in oracles) / 2 for h in range(6)]
        assert found == each[:: spec.heads // len(found)]
