"""Files that are damaged, forged, of another model or another pipeline are refused."""

from __future__ import annotations

import json
import struct

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvpolicy import AdmitAll, Quest, RandomGate, SnapKV
from kvpolicy.store import load, persist, save
from kvpolicy.store.fingerprint import tensors_hash
from tests.support.store.saved import PIPELINE, SPEC, filled


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


def forged(path, change=lambda tensors: None, head=lambda header: None):
    """The file with changed tensors or header and a checksum that fits."""
    header, tensors = persist._read(path)
    header.pop("checksum")
    change(tensors)
    head(header)
    header["checksum"] = tensors_hash(tensors, header)
    save_file(tensors, path, metadata=header)


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


OTHER_FORMATS = {
    "another": lambda header: header.update(format="kvpolicy-cache-2"),
    "none": lambda header: header.pop("format"),
    **{f"without {key}": lambda header, key=key: header.pop(key)
       for key in ("model", "pipeline", "spec", "notes")},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_another_format_is_refused_whatever_its_checksum(path, name):
    forged(path, head=OTHER_FORMATS[name])
    with pytest.raises(ValueError, match="is no cache of format kvpolicy-cache-1$"):
        load(path, PIPELINE, SPEC, fingerprint="model")


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
    save_file({"a": torch.zeros(1)}, tmp_path / "cache")
    with pytest.raises(ValueError, match="no cache of format"):
        load(tmp_path / "cache", PIPELINE, SPEC)
