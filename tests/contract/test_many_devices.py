"""A cache whose layers lie on two devices holds, gives and drops what one on one device does."""

from __future__ import annotations

import contextlib

import attrs
import pytest
import torch

from kvpolicy import CacheSpec, CapacityError
from kvpolicy.store import clear, load, move, park, save, side_state, unpark
from kvpolicy.store.fork import adopt, select_rows
from kvpolicy.store.rollback import crop
from tests.support.contract.cases import EVICTIONS, Sizes, build
from tests.support.contract.contents import contents
from tests.support.contract.driver import Run, feed, streams_of
from tests.support.labelled import ONE, TWO, Labels, without_labels

GPUS = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ],
)
LABELS = pytest.param(
    "labels", marks=pytest.mark.skipif(bool(without_labels), reason=without_labels)
)
SPEC = CacheSpec(
    layers=4, heads=4, kv_heads=2, head_dim=8, page_size=4, interval=3, dtype=torch.float64,
    sliding=(None, None, None, 6),
)  # fmt: skip
SIZES = Sizes(SPEC, window=5)
ROWS, STEPS = [SIZES.length, 4, SIZES.length // 2], 7
# Each kind of tensor that policies hold, and each way in which layers decide together.
SOME = [
    ("gate", "quest_each", "across_layers"),
    ("duo", "xattention_quest", "cap_decode"),
    ("zap", "user", "critical_expected"),
    ("ada_ea", "per_layer", "h2o_decode"),
]
ADMITS = ("all", "gate", "random", "zap")
SELECTS = ("all", "quest", "quest_mean", "xattention")


@pytest.fixture(params=[LABELS, GPUS])
def places(request):
    """One device for a whole cache and two for the layers of another, with what they run in."""
    if request.param == "labels":
        return torch.device("cpu"), [ONE, TWO], Labels
    first, second = (torch.device("cuda", n) for n in range(2))
    return first, [first, second], contextlib.nullcontext


def spread(spec, devices):
    """The layers on two devices by turns."""
    on = [devices[n % 2] for n in range(spec.layers)]
    return attrs.evolve(spec, device=on[0], devices=on)


def driven(pipeline, spec, rows=ROWS, steps=STEPS):
    run = Run(pipeline, spec, streams_of(SIZES, rows, 4 * STEPS, seed=1), oracle=False)
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


def same(whole, run, context):
    with context():
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


def compare(names, places, spec=SPEC):
    one, two, context = places
    pipeline = build(SIZES, *names, backend="reference")
    whole = driven(pipeline, attrs.evolve(spec, device=one))
    with context():
        run = driven(pipeline, spread(spec, two))
    same(whole, run, context)
    return whole, run


@pytest.mark.parametrize("names", SOME, ids="-".join)
def test_what_is_kept(names, places):
    whole, run = compare(names, places)
    assert len(run.state.devices.pools) == 2 * len(whole.state.devices.pools)
    pools = {(pool.device, x.device) for x in run.state.layers for pool in [x.pool]}
    assert len(pools) == 2 and all(a == b for a, b in pools)


@pytest.mark.slow
@pytest.mark.parametrize("eviction", sorted(EVICTIONS))
def test_every_eviction(eviction, places):
    place = sorted(EVICTIONS).index(eviction)
    compare((ADMITS[place % 4], SELECTS[place // 2 % 4], eviction), places)


@pytest.mark.parametrize("names", [SOME[0], ("random", "quest", "r_kv")], ids="-".join)
def test_sequences_that_move_fork_and_are_filed(names, places, tmp_path):
    """Forks, rows in another order, slots, parking, crop and files, each followed by decoding."""
    one, two, context = places
    pipeline = build(SIZES, *names, backend="reference")
    specs = attrs.evolve(SPEC, device=one), spread(SPEC, two)
    runs = []
    for spec, inside in zip(specs, (contextlib.nullcontext, context), strict=True):
        with inside():
            run = driven(pipeline, spec, steps=1)
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
    same(*runs, context)
    # The last file is of two devices: it goes on there, on one, and with devices exchanged.
    again = runs[0].copy(load(tmp_path / "cache", pipeline, specs[0])[0])
    again.decode()
    back = spread(SPEC, two[::-1])
    with context():
        run = runs[1].copy(load(tmp_path / "cache", pipeline, back)[0])
        run.spec = back
        run.decode()
    same(again, run, context)


def test_a_cap_of_tokens_is_of_every_head(places):
    spec = attrs.evolve(SPEC, max_tokens=SIZES.kept + 3, at_cap="evict")
    whole, _ = compare(("duo", "all", "h2o_decode"), places, spec)
    assert sum(row.cap_evicted for row in whole.state.sequences)


@pytest.mark.parametrize("cap", ["max_tokens", "max_bytes"])
def test_a_call_beyond_a_cap_leaves_all_devices_alone(cap, places):
    _, two, context = places
    page = SPEC.page_size * (2 * SPEC.head_dim * SPEC.dtype.itemsize + 4)
    most = {"max_tokens": SIZES.kept, "max_bytes": 3 * 64 * page}[cap]
    spec, rows = spread(attrs.evolve(SPEC, **{cap: most}), two), [SIZES.length] * 8
    with context():
        run = Run(build(SIZES, backend="reference"), spec, streams_of(SIZES, rows, 0, 1), False)
        if cap == "max_bytes":  # two layers that policies manage on the first, one on the second
            assert [pool.limit for pool in run.state.devices.pools] == [127, 63]
        with pytest.raises(CapacityError):
            run.prompt(rows)
        run.pipeline.abort(run.state)
        assert not any(run.state.lengths)
        assert not any(pool.used for pool in run.state.devices.pools)


def test_a_cap_that_is_too_small_for_all_devices_says_how_much_it_wants(places):
    _, two, context = places
    page = SPEC.page_size * (2 * SPEC.head_dim * SPEC.dtype.itemsize + 4)
    spec = spread(attrs.evolve(SPEC, max_bytes=2 * 64 * page), two)
    with context(), pytest.raises(ValueError, match=f"wanted at least {3 * 64 * page}, .* each"):
        build(SIZES, backend="reference").init(spec)
