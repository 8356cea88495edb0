"""A shard of a model's heads decides and holds what the whole does for those heads."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import CacheSpec
from tests.support.contract.cases import Sizes, build
from tests.support.contract.contents import contents
from tests.support.contract.driver import Run, feed, streams_of

EVICTIONS = ["none", "tokens_decode", "pyramid", "at_end_gate"]
ASKING = ["expected_decode", "cap_kv", "critical", "critical_expected", "r_kv", "tri"]


@pytest.mark.parametrize(
    "admission, eviction",
    [(a, e) for a in ("random", "duo", "gate", "per_layer") for e in EVICTIONS]
    + [("ada_ea", e) for e in ASKING if "critical_" not in e],
)
def test_a_shard_of_heads_holds_its_part(admission, eviction):
    spec = CacheSpec(
        layers=2, heads=6, kv_heads=3, head_dim=8, page_size=4, interval=3, dtype=torch.float64
    )
    sizes = Sizes(spec, window=5)
    pipeline, rows = build(sizes, admission, "quest_each", eviction), [sizes.length]
    streams = streams_of(sizes, rows, 8, seed=1)
    whole = Run(pipeline, spec, streams)
    part = attrs.evolve(spec, heads=4, kv_heads=2, head_offset=1, all_kv_heads=3)
    cut = [[(q[2:], k[1:], v[1:], pre[1:]) for q, k, v, pre in layers] for layers in streams]
    shard = Run(pipeline, part, cut, oracle=False)
    for run in (whole, shard):
        feed(run, rows, 1, 30)
        for _ in range(8):
            run.decode()
    whole.check_effect()
    for layer in range(spec.layers):
        pair = contents(whole.state, layer, 0)[1:], contents(shard.state, layer, 0)
        for a, b in zip(*pair, strict=True):
            a.pop("queries", None), b.pop("queries", None)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
