"""Parts that share the heads of a cache keep what one of all heads keeps, or fail together."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    TOVA,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    CapacityError,
    DuoAttention,
    Knorm,
    KVPress,
    RandomGate,
    SnapKV,
    UnsupportedError,
)
from tests.support.contract.cases import EVICTIONS, Sizes, build
from tests.support.contract.contents import contents
from tests.support.contract.driver import Run, feed, streams_of
from tests.support.contract.split import run_parts

SPEC = CacheSpec(
    layers=2, heads=8, kv_heads=4, head_dim=8, page_size=4, interval=3, dtype=torch.float64
)
SIZES = Sizes(SPEC, window=5)
SHARING = [
    "adaptive", "adaptive_pyramid", "across_layers", "lazy_layers", "headkv", "lukv", "cap",
    "cap_decode", "simlayer", "tova_layer", "critical_expected",
]  # fmt: skip


def halved(eviction):
    """A pipeline that admits in the heads of the second part alone."""
    full = [[False, False, True, True]] * SPEC.layers
    admission = DuoAttention(full_heads=full, sinks=0, window=SIZES.window)
    return CachePipeline(admission=admission, eviction=EVICTIONS[eviction](SIZES), window=5)


class Norms:
    """A press that ranks all heads of a layer together."""

    def score(self, module, hidden, keys, values, attentions, kwargs):
        sizes = keys.norm(dim=-1)
        return sizes / sizes.sum((1, 2), keepdim=True)


def same(whole, runs):
    """Every part holds what the whole does for its heads, and says the same of its sequences."""
    rows = range(whole.state.batch)
    for n, run in enumerate(runs):
        own = slice(n * run.spec.kv_heads, (n + 1) * run.spec.kv_heads)
        for layer in range(SPEC.layers):
            for row in rows:
                pair = contents(whole.state, layer, row)[own], contents(run.state, layer, row)
                for a, b in zip(*pair, strict=True):
                    a.pop("queries", None), b.pop("queries", None)
                    assert a.keys() == b.keys() and all(torch.equal(a[x], b[x]) for x in a)
        told = [[attrs.evolve(x, cap_evicted=0, overshoot=0) for x in y.state.sequences]
                for y in (whole, run)]  # fmt: skip
        assert told[0] == told[1]


def compare(pipelines, spec=SPEC, rows=None, steps=7):
    rows = [SIZES.length, 4, SIZES.length // 2] if rows is None else rows
    streams = streams_of(SIZES, rows, steps, seed=1)

    def drive(run):
        feed(run, rows, 1, 40)
        for _ in range(steps):
            run.decode()

    whole = Run(pipelines[0], spec, streams, oracle=False)
    drive(whole)
    found = run_parts(pipelines, spec, streams, drive)
    for run, error in found:
        assert run is not None, error
    same(whole, [run for run, _ in found])
    return whole, found


@pytest.mark.parametrize("admission", ["all", "random"])
@pytest.mark.parametrize("eviction", SHARING)
def test_parts_keep_what_the_whole_keeps(admission, eviction):
    whole, _ = compare([build(SIZES, admission, "quest_each", eviction)] * 2)
    whole.check_effect(selection=False)


def test_four_parts_whose_layers_look_across_in_different_ways():
    press = KVPress(press=Norms(), budget=SIZES.kept, across_heads=True)
    for eviction in (press, TOVA(budget=SIZES.kept, across_heads=True)):
        compare([CachePipeline(eviction=eviction, window=SIZES.window)] * 4)


def test_a_part_without_tokens_joins():
    """Heads of one part admit nothing: it has no scores, and the others' need them."""
    whole, found = compare([halved("adaptive")] * 2)
    assert not found[0][0].state.layers[0].counts.any()
    assert found[1][0].state.layers[0].counts.any()


@pytest.mark.parametrize("eviction", ["tokens_decode", "adaptive", "h2o_decode"])
def test_parts_evict_together_at_a_cap_of_tokens(eviction):
    spec = attrs.evolve(SPEC, max_tokens=SIZES.kept + 3, at_cap="evict")
    whole, _ = compare([build(SIZES, "duo", "all", eviction)] * 2, spec)
    assert sum(row.cap_evicted for row in whole.state.sequences)


def test_parts_reserve_for_the_same_steps():
    """One of them has hardly any page left, so that all ask again as soon as it does."""
    pipeline = halved("none")
    rows, reserved = [SIZES.length], []
    streams = streams_of(SIZES, rows, 9, seed=1)

    def drive(run):
        feed(run, rows, 1, 40)
        pool = run.state.devices.pools[0]
        if run.spec.head_offset:
            pool.limit = pool.used + 12
        for _ in range(9):
            run.decode()
            reserved.append((run.at[0], run.state.steps_reserved))

    for run, error in run_parts([pipeline] * 2, attrs.evolve(SPEC, interval=16), streams, drive):
        assert run is not None, error
    assert len(set(reserved)) == 9 and reserved[-1][1] < 7


class Breaks(Exception):
    pass


@attrs.frozen(kw_only=True)
class Broken(SnapKV):
    """SnapKV that fails at a layer."""

    at_layer: int | None = None

    def scores(self, ops, stored):
        if stored.view().layer == self.at_layer:
            raise Breaks
        return super().scores(ops, stored)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["adaptive", "tokens"])
def test_a_part_that_fails_leaves_every_cache_as_it_was(layer, name):
    budget = EVICTIONS[name](SIZES).budget
    made = [
        CachePipeline(
            eviction=Broken(budget=budget, observation=3, at_layer=at), window=SIZES.window
        )
        for at in (None, layer)
    ]
    rows = [SIZES.length]
    streams, before = streams_of(SIZES, rows, 0, seed=1), {}

    def drive(run):
        run.prompt(rows)
        held = [contents(run.state, n, 0) for n in range(SPEC.layers)]
        try:
            run.pipeline.end_prompt(run.state)
        finally:
            after = [contents(run.state, n, 0) for n in range(SPEC.layers)]
            before[run.spec.head_offset] = repr(held) == repr(after)

    found = run_parts(made, SPEC, streams, drive)
    assert all(run is None for run, _ in found)
    assert isinstance(found[1][1], Breaks)
    assert before == {0: True, 2: True}


def test_a_cap_of_one_part_is_a_cap_of_all():
    spec = attrs.evolve(SPEC, max_tokens=SIZES.kept)
    rows = [SIZES.length]

    def drive(run):
        run.prompt([SIZES.window])
        for _ in range(60):
            run.decode()

    pipeline = halved("none")
    found = run_parts([pipeline] * 2, spec, streams_of(SIZES, rows, 9, seed=1), drive)
    assert isinstance(found[1][1], CapacityError) and found[0][0] is None


def test_what_cannot_be_split_is_refused():
    from kvpolicy.exchange import ALONE

    shard = attrs.evolve(SPEC, heads=4, kv_heads=2, all_kv_heads=4)
    across = attrs.frozen(type("Across", (Knorm,), {"across_heads": True}))(budget=14)
    pipeline = CachePipeline(eviction=across, window=5)
    with pytest.raises(UnsupportedError, match="Across.*gathers_heads = True"):
        pipeline.init(shard, 1, ALONE)
    pipeline = CachePipeline(eviction=TOVA(budget=14, across_heads=True), window=5)
    with pytest.raises(UnsupportedError, match="TOVA.*give init an `exchange`"):
        pipeline.init(shard)
    CachePipeline(eviction=AtPromptEnd(RandomGate(sparsity=0.2)), window=5).init(shard)
