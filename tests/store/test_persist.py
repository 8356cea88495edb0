"""Caches in files: what is written, what comes back, and what is refused."""

from __future__ import annotations

import json
import struct

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy import (
    AdmitAll,
    CachePipeline,
    CacheSpec,
    CapacityError,
    PhaseError,
    Quest,
    RandomGate,
    SnapKV,
    Tokens,
    WriteGate,
)
from kvpolicy.store import load, persist, save
from kvpolicy.store.fingerprint import pipeline_fingerprint, tensors_hash
from kvpolicy.store.rows import select_rows

SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, rollback=3)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.3),
    selection=Quest(budget=9),
    eviction=SnapKV(budget=30, observation=3, when="decode"),
    window=5,
)


def call(pipeline, state, phase, counts, seed=0):
    rng = torch.Generator().manual_seed(seed)
    spec = state.spec
    lead = () if phase == "prompt" else (state.batch,)
    tokens = sum(counts) if phase == "prompt" else 1
    pipeline.begin(state, counts, phase)
    outs = []
    for layer in range(spec.layers):
        q = torch.randn(*lead, spec.heads, tokens, spec.head_dim, generator=rng).to(spec.dtype)
        k, v = (
            torch.randn(*lead, spec.kv_heads, tokens, spec.head_dim, generator=rng).to(spec.dtype)
            for _ in range(2)
        )
        outs.append(pipeline.attend(state, layer, q, k, v, key_pre=k))
    pipeline.commit(state)
    return torch.stack(outs)


def filled(pipeline=PIPELINE, spec=SPEC, counts=(50, 23)):
    state = pipeline.init(spec, len(counts))
    call(pipeline, state, "prompt", counts)
    pipeline.end_prompt(state)
    call(pipeline, state, "decode", [1] * len(counts), seed=1)
    return state


@pytest.fixture
def path(tmp_path):
    save(filled(), tmp_path / "cache", PIPELINE, fingerprint="model")
    return tmp_path / "cache"


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
    assert next(iter(back.pools.values())).used == used + partial


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_byte_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped")
    save(filled(counts=(12,)), folder / "cache", PIPELINE)
    good = bytearray((folder / "cache").read_bytes())
    (head,) = struct.unpack("<Q", good[:8])
    # Half of the flips hit the header, which is small. Its padding is white space.
    end = len(good[: 8 + head].rstrip())
    places = st.integers(0, end - 1) | st.integers(8 + head, len(good) - 1)
    at, bits = data.draw(places), data.draw(st.integers(1, 255))
    good[at] ^= bits
    (folder / "cache").write_bytes(good)
    with pytest.raises(ValueError, match="altered|truncated|no cache"):
        load(folder / "cache", PIPELINE, SPEC)


@pytest.mark.parametrize("share", [0, 0.0005, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        load(path, PIPELINE, SPEC, fingerprint="model")


def test_another_model_is_refused(path):
    with pytest.raises(ValueError, match="model: .*another model"):
        load(path, PIPELINE, SPEC, fingerprint="other")


@pytest.mark.parametrize(
    "change",
    [
        {"admission": RandomGate(sparsity=0.3, seed=1)},
        {"admission": AdmitAll()},
        {"selection": Quest(budget=9, last=0)},
        {"eviction": SnapKV(budget=31, observation=3, when="decode")},
        {"window": 6, "selection": Quest(budget=9)},
    ],
)
def test_another_pipeline_is_refused(path, change):
    with pytest.raises(ValueError, match="pipeline: .*other policies|altered: 0.ring_k"):
        load(path, attrs.evolve(PIPELINE, **change), SPEC, fingerprint="model")


@pytest.mark.parametrize(
    ("name", "value"),
    [("page_size", 8), ("rollback", 4), ("interval", 3), ("heads", 8), ("scale", 1.0),
     ("dtype", torch.bfloat16), ("sliding", (None, 3)), ("layers", 3)],
)  # fmt: skip
def test_another_size_is_refused(path, name, value):
    with pytest.raises(ValueError, match=f"{name}: the cache was saved with .*, got"):
        load(path, PIPELINE, attrs.evolve(SPEC, **{name: value}), fingerprint="model")


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


def forged(path, change):
    """The file with changed tensors and a checksum that fits."""
    header, tensors = persist._read(path)
    header.pop("checksum")
    change(tensors)
    header["checksum"] = tensors_hash(tensors, header)
    persist.save_file(tensors, path, metadata=header)


HOSTILE = {
    "long": lambda t: t.update(lengths=torch.tensor([1 << 29, 28])),
    "longer": lambda t: t.update(lengths=torch.tensor([1 << 40, 28])),
    "many rows": lambda t: t.update(lengths=torch.zeros(1 << 16, dtype=torch.int64)),
    "floats": lambda t: t.update(lengths=t["lengths"].float()),
    "negative counts": lambda t: t["0.counts"].fill_(-1),
    "too many": lambda t: t["1.counts"].fill_(60),
    "wild table": lambda t: t["0.table"].masked_fill_(t["0.table"] > 0, 1 << 30),
    "negative table": lambda t: t["0.table"].neg_(),
    "shape": lambda t: t.update({"1.v": t["1.v"][:, :2].contiguous()}),
    "missing": lambda t: t.pop("1.meta"),
    "dtype": lambda t: t.update({"0.k": t["0.k"].half()}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_file_is_refused_before_memory_is_taken(path, name, monkeypatch):
    forged(path, HOSTILE[name])
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *s, **k: made.append(s) or zeros(*s, **k))
    with pytest.raises(ValueError, match="altered"):
        load(path, PIPELINE, SPEC, fingerprint="model")
    assert all(torch.Size(x for x in s if isinstance(x, int)).numel() < 1 << 18 for s in made)


@pytest.mark.parametrize("size", [100, 1 << 40, (1 << 63) - 1])
def test_a_huge_header_is_refused(tmp_path, size):
    body = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    (tmp_path / "cache").write_bytes(struct.pack("<Q", size) + body.encode().ljust(100))
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        load(tmp_path / "cache", PIPELINE, SPEC)


def test_a_pickle_is_refused(tmp_path):
    torch.save({"lengths": torch.zeros(1)}, tmp_path / "cache")
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        load(tmp_path / "cache", PIPELINE, SPEC)
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "none", PIPELINE, SPEC)


def test_other_safetensors_are_refused(tmp_path):
    persist.save_file({"a": torch.zeros(1)}, tmp_path / "cache")
    with pytest.raises(ValueError, match="no cache of format"):
        load(tmp_path / "cache", PIPELINE, SPEC)


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

    monkeypatch.setattr(persist, "save_file", fail)
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
