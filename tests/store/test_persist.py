"""Caches in files: what is written and what comes back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import safetensors.torch
import torch

from kvpolicy import (
    CachePipeline,
    CapacityError,
    PhaseError,
    RandomGate,
    SnapKV,
    Tokens,
    WriteGate,
)
from kvpolicy.store import load, persist, save
from kvpolicy.store.fingerprint import pipeline_fingerprint
from kvpolicy.store.fork import select_rows
from tests.support.store.saved import PIPELINE, SPEC, call, filled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_cache_goes_on_bit_for_bit(tmp_path, dtype):
    spec = attrs.evolve(SPEC, dtype=dtype)
    state = filled(spec=spec)
    save(state, tmp_path / "cache", PIPELINE)
    other = load(tmp_path / "cache", PIPELINE, spec)[0]
    for seed in range(40):  # past two evictions
        assert torch.equal(*(call(PIPELINE, s, "decode", [1, 1], seed) for s in (state, other)))
    assert torch.equal(*(call(PIPELINE, s, "prompt", [9, 0], 99) for s in (state, other)))
    assert PIPELINE.report(state).evicted == PIPELINE.report(other).evicted
    assert sum(map(sum, PIPELINE.report(other).evicted)) > 0


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """safetensors opens it twice, for the header and for the bytes."""
    old, new = filled(), filled()
    call(PIPELINE, new, "decode", [1, 1], 7)  # other values of the same shapes
    save(old, tmp_path / "cache", PIPELINE)
    real, replaced = torch.UntypedStorage.from_file, []

    def between(*args, **options):
        if not replaced:
            replaced.append(save(new, tmp_path / "cache", PIPELINE))
        return real(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", between)
    found = load(tmp_path / "cache", PIPELINE, SPEC)[0]
    assert replaced and found.lengths == new.lengths != old.lengths
    assert torch.equal(*(call(PIPELINE, s, "decode", [1, 1], 3) for s in (found, new)))


def test_threads_may_save_to_one_path(tmp_path):
    states = [filled() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda n: save(states[n % 4], tmp_path / "cache", PIPELINE), range(40)):
            assert load(tmp_path / "cache", PIPELINE, SPEC)[0].lengths == states[0].lengths
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_only_pages_in_use_are_written(tmp_path):
    pipeline = CachePipeline(admission=RandomGate(sparsity=0.9), window=5)
    state = filled(pipeline, counts=(400, 9))
    twins = select_rows(state, [0, 0, 1])
    used = sum(int(-(-x.counts // 4).sum()) for x in state.layers)
    shared = sum(int((x.counts[0] // 4).sum()) for x in state.layers)
    for cache, name in ((state, "one"), (twins, "twins")):
        save(cache, tmp_path / name, pipeline)
    tensors = persist._read(tmp_path / "one")[1]
    assert sum(len(tensors[f"{layer}.k"]) for layer in range(2)) == used
    tensors = persist._read(tmp_path / "twins")[1]
    partial = used - shared - sum(int((-(-x.counts[1] // 4)).sum()) for x in state.layers)
    assert sum(len(tensors[f"{layer}.k"]) for layer in range(2)) == used + partial
    back = load(tmp_path / "twins", pipeline, SPEC)[0]
    assert pipeline.report(back).shared_pages == shared
    assert back.devices.pools[0].used == used + partial


def test_a_policy_weight_changes_the_fingerprint():
    rng = torch.Generator().manual_seed(0)
    shapes = {"norm_pre": (2, 8), "norm_post": (2, 8), "w1": (2, 2, 3, 16), "b1": (2, 2, 3)}
    weights = {n: torch.randn(s, generator=rng) for n, s in shapes.items()}
    weights |= {"w2": torch.ones(2, 2, 3), "b2": torch.zeros(2, 2)}
    found = {pipeline_fingerprint(CachePipeline(admission=WriteGate(**weights, threshold=0.5)))}
    for name, tensor in weights.items():
        other = tensor.clone()
        other.view(-1)[-1] += 1e-3
        gate = WriteGate(**(weights | {name: other}), threshold=0.5)
        found.add(pipeline_fingerprint(CachePipeline(admission=gate)))
    assert len(found) == 7
    copies = {n: t.clone() for n, t in weights.items()}
    same = CachePipeline(admission=WriteGate(**copies, threshold=0.5), backend="reference")
    assert pipeline_fingerprint(same) in found


def test_a_field_without_a_fingerprint_is_named():
    @attrs.frozen(kw_only=True)
    class Odd(SnapKV):
        rule: object = None

    with pytest.raises(TypeError, match="function .*no fingerprint"):
        pipeline_fingerprint(CachePipeline(eviction=Odd(budget=999, rule=lambda x: x)))


def test_an_open_call_is_not_saved(tmp_path):
    state = filled()
    PIPELINE.begin(state, [1, 1], "prompt")
    with pytest.raises(PhaseError, match="call is in flight"):
        save(state, tmp_path / "cache", PIPELINE)


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(filled(), path, PIPELINE)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == ["cache"]


def test_a_cap_holds_for_loading(tmp_path):
    pipeline = CachePipeline(window=5)
    save(filled(pipeline, counts=(300, 300)), tmp_path / "cache", pipeline)
    page = 4 * (2 * 8 * 4 + 4)
    with pytest.raises(CapacityError):
        load(tmp_path / "cache", pipeline, attrs.evolve(SPEC, max_bytes=100 * page))
    load(tmp_path / "cache", pipeline, attrs.evolve(SPEC, max_bytes=700 * page))


def test_an_empty_cache_is_saved(tmp_path):
    save(PIPELINE.init(SPEC, 3), tmp_path / "cache", PIPELINE, notes={"a": "b"}, extra={})
    state, extra, notes = load(tmp_path / "cache", PIPELINE, SPEC)
    assert (state.lengths, extra, notes) == ([0, 0, 0], {}, {"a": "b"})
    call(PIPELINE, state, "prompt", [4, 0, 30])


def test_tokens_count_in_the_fingerprint():
    one, two = (CachePipeline(eviction=SnapKV(budget=Tokens(n))) for n in (300, 301))
    assert pipeline_fingerprint(one) != pipeline_fingerprint(two)
