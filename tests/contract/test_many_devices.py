"""A cache whose layers lie on two devices holds, gives and drops what one on one device does."""

from __future__ import annotations

import contextlib
from typing import Any

import attrs
import pytest
import torch

from kvpolicy import BackendError, CachePipeline, CacheSpec, CapacityError
from kvpolicy.store import clear, load, move, park, save, side_state, unpark
from kvpolicy.store.fork import adopt, select_rows
from kvpolicy.store.rollback import crop
from tests.support.contract.cases import EVICTIONS, Sizes, build
from tests.support.contract.contents import contents
from tests.support.contract.driver import Run, feed, streams_of
from tests.support.labelled import ONE, TWO, Labels, without_labels

SPEC = CacheSpec(
    layers=4, heads=4, kv_heads=2, head_dim=8, page_size=4, interval=3, dtype=torch.float64,
    sliding=(None, None, None, 6),
)  # fmt: skip
WINDOW, STEPS = 5, 7
# Each kind of tensor that policies hold, and each way in which layers decide together.
SOME = [
    ("gate", "quest_each", "across_layers"),
    ("duo", "xattention_quest", "cap_decode"),
    ("zap", "user", "critical_expected"),
    ("ada_ea", "per_layer", "h2o_decode"),
]
# Evictions that hold tensors, keep numbers, or look at other layers, statistics and projections.
HOLDING = (
    "at_end_gate", "critical", "expected_decode", "fast", "h2o", "headkv", "judge", "kvzip",
    "lazy_layers", "per_layer_mixed", "q_filters", "ranked", "tova_layer", "tri", "trim",
)  # fmt: skip
ADMITS = ("all", "gate", "random", "zap")
SELECTS = ("all", "quest", "quest_mean", "xattention")


@attrs.frozen
class Places:
    """One device for a whole cache and two for the layers of another, which runs `inside`."""

    one: torch.device
    two: list[torch.device]
    inside: Any
    spec: CacheSpec
    backend: Any

    @property
    def sizes(self):
        return Sizes(self.spec, WINDOW)

    def build(self, *names):
        return build(self.sizes, *names, backend=self.backend)

    def spread(self, spec, back=False):
        """The layers on both devices by turns."""
        on = [self.two[(n + back) % 2] for n in range(spec.layers)]
        return attrs.evolve(spec, device=on[0], devices=on)


LABELS = pytest.param(
    "labels", marks=pytest.mark.skipif(bool(without_labels), reason=without_labels)
)
GPUS = pytest.param(
    "gpus",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ],
)


@pytest.fixture(params=[LABELS, GPUS])
def places(request):
    if request.param == "labels":
        return Places(SPEC.device, [ONE, TWO], Labels, SPEC, "reference")
    first, second = (torch.device("cuda", n) for n in range(2))
    spec = attrs.evolve(SPEC, dtype=torch.float32, device=first)
    return Places(first, [first, second], contextlib.nullcontext, spec, "triton")


def driven(pipeline, spec, sizes, steps=STEPS):
    rows = [sizes.length, 4, sizes.length // 2]
    run = Run(pipeline, spec, streams_of(sizes, rows, 4 * STEPS, seed=1), oracle=False)
    feed(run, rows, 1, 40)
    for _ in range(steps):
        run.decode()
    return run


def held(state):
    """What layers hold of each sequence, on the host."""
    return [
        {name: x.cpu() for name, x in head.items()}
        for layer in range(state.spec.layers)
        for row in range(state.batch)
        for head in contents(state, layer, row)
    ]


def same(whole, run, inside):
    with inside():
        found, told = held(run.state), run.pipeline.report(run.state)
    for mine, theirs in zip(found, held(whole.state), strict=True):
        assert mine.keys() == theirs.keys()
        for name, x in mine.items():
            if name.startswith("query_"):  # sums
                torch.testing.assert_close(x, theirs[name])
            else:
                assert torch.equal(x, theirs[name]), name
    assert run.state.sequences == whole.state.sequences
    wanted = whole.pipeline.report(whole.state)
    for name in ("tokens", "admitted", "stored", "evicted", "read", "ring", "queries", "policies"):
        assert getattr(told, name) == getattr(wanted, name), name


def compare(places, names, **caps):
    spec, pipeline = attrs.evolve(places.spec, **caps), places.build(*names)
    whole = driven(pipeline, spec, places.sizes)
    with places.inside():
        run = driven(pipeline, places.spread(spec), places.sizes)
    same(whole, run, places.inside)
    return whole, run


@pytest.mark.parametrize(
    "names",
    [pytest.param(x, marks=[pytest.mark.slow] * (n > 1)) for n, x in enumerate(SOME)],
    ids="-".join,
)
def test_what_is_kept(names, places):
    whole, run = compare(places, names)
    assert len(run.state.devices.pools) == 2 * len(whole.state.devices.pools)
    pools = {(x.pool.device, x.device) for x in run.state.layers}
    assert len(pools) == 2 and all(a == b for a, b in pools)
    with places.inside():
        report = run.pipeline.report(run.state)
    assert list(report.devices) == [str(x) for x in places.two]
    assert min(report.devices.values()) > 0 and sum(report.devices.values()) == report.kv
    assert str(places.two[1]) in str(report) and not whole.pipeline.report(whole.state).devices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "eviction"),
    [
        pytest.param(way.values[0], name, marks=way.marks)
        for way, names in ((LABELS, HOLDING), (GPUS, sorted(EVICTIONS)))
        for name in names
    ],
    indirect=["places"],
)
def test_every_eviction(eviction, places):
    place = sorted(EVICTIONS).index(eviction)
    compare(places, (ADMITS[place % 4], SELECTS[place // 2 % 4], eviction))


@pytest.mark.slow
@pytest.mark.parametrize("names", [SOME[0], ("random", "quest", "r_kv")], ids="-".join)
def test_sequences_that_move_fork_and_are_filed(names, places, tmp_path):
    """Forks, rows in another order, slots, parking, crop and files, each followed by decoding."""
    pipeline, runs = places.build(*names), []
    specs = places.spec, places.spread(places.spec)
    for spec, inside in zip(specs, (contextlib.nullcontext, places.inside), strict=True):
        with inside():
            run = driven(pipeline, spec, places.sizes, steps=1)
            crop(run.state, [1, 0, 1])
            run.at = list(run.state.lengths)
            fork = run.copy(select_rows(run.state, [2, 0, 1]))
            fork.streams = [run.streams[row] for row in (2, 0, 1)]
            fork.at = list(fork.state.lengths)
            fork.decode()
            adopt(run.state, fork.state)
            run.streams, run.at = fork.streams, list(run.state.lengths)
            waits = park(run.state, 1)
            side = side_state(run.state)
            clear(side, [0])
            unpark(side, 0, waits)
            move(run.state, 1, side, 0)
            run.decode()
            save(run.state, tmp_path / "cache", pipeline)
            runs.append(run)
    same(*runs, places.inside)
    # The last file is of two devices: it goes on, on one and with devices exchanged.
    again = runs[0].copy(load(tmp_path / "cache", pipeline, specs[0])[0])
    again.decode()
    back = places.spread(places.spec, back=True)
    with places.inside():
        run = runs[1].copy(load(tmp_path / "cache", pipeline, back)[0])
        run.spec = back
        run.decode()
    same(again, run, places.inside)


@pytest.mark.slow
def test_a_cap_of_tokens_is_of_every_head(places):
    caps = {"max_tokens": places.sizes.kept + 3, "at_cap": "evict"}
    whole, _ = compare(places, ("duo", "all", "h2o_decode"), **caps)
    assert sum(row.cap_evicted for row in whole.state.sequences)


@pytest.mark.parametrize("cap", ["max_tokens", "max_bytes"])
def test_a_call_beyond_a_cap_leaves_all_devices_alone(cap, places):
    page = SPEC.page_size * (2 * SPEC.head_dim * places.spec.dtype.itemsize + 4)
    most = {"max_tokens": places.sizes.kept, "max_bytes": 3 * 64 * page}[cap]
    spec = places.spread(attrs.evolve(places.spec, **{cap: most}))
    rows = [places.sizes.length] * 8
    with places.inside():
        run = Run(places.build(), spec, streams_of(places.sizes, rows, 0, 1), oracle=False)
        if cap == "max_bytes":  # two layers that policies manage on the first, one on the second
            assert [pool.limit for pool in run.state.devices.pools] == [127, 63]
        with pytest.raises(CapacityError):
            run.prompt(rows)
        run.pipeline.abort(run.state)
        assert not any(run.state.lengths)
        assert not any(pool.used for pool in run.state.devices.pools)


def test_a_cap_that_is_too_small_for_all_devices_says_how_much_it_wants(places):
    page = SPEC.page_size * (2 * SPEC.head_dim * places.spec.dtype.itemsize + 4)
    spec = places.spread(attrs.evolve(places.spec, max_bytes=2 * 64 * page))
    with places.inside(), pytest.raises(ValueError, match=f"at least {3 * 64 * page}, .* each"):
        places.build().init(spec)


def test_what_devices_there_may_be():
    sizes = {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8}
    assert CacheSpec(**sizes, devices=["cuda:1", "cuda:0"]).device == torch.device("cuda:1")
    with pytest.raises(ValueError, match="devices: wanted one for each of 2 layers, got 1"):
        CacheSpec(**sizes, devices=["cpu"])
    with pytest.raises(ValueError, match="device: wanted that of the first layer, cuda:1, got cpu"):
        CacheSpec(**sizes, device="cpu", devices=["cuda:1", "cuda:0"])
    with pytest.raises(TypeError, match="devices: wanted a torch.device or its name"):
        CacheSpec(**sizes, devices=[0, 1])
    mixed = CacheSpec(**sizes, devices=["cpu", "cuda:0"])
    with pytest.raises(BackendError, match="reference on cpu, triton on cuda:0"):
        CachePipeline().dry(mixed)
    pools = CachePipeline(backend="reference").dry(mixed).devices.pools
    assert len(pools) == 2 and all(pool.device.type == "meta" for pool in pools)
