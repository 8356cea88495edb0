"""Trained policies by name: what is where, in which bytes, and what is said where one is absent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvpolicy import DuoAttention, WriteGate, pretrained
from kvpolicy.admission import _packed
from kvpolicy.admission.write_gate import WEIGHTS

HERE = Path(pretrained.__file__).parent
GATE, DUO = "smollm2-135m-instruct-w64-keep25", "duo-smollm2-135m-instruct"
ABSENT = "smollm2-135m-instruct-w64-keep10"


@pytest.fixture
def installed(monkeypatch, tmp_path) -> Path:
    """An installation that holds no policy at all."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "_FOLDER", folder)
    monkeypatch.delenv(pretrained.ENVIRONMENT, raising=False)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path) -> dict[str, bytes]:
    """A hub of the files in it, as `repository/file`; any other fails as without a network."""
    held: dict[str, bytes] = {}

    def download(repository: str, file: str, **_: object) -> str:
        if f"{repository}/{file}" not in held:
            raise ConnectionError("no network")
        path = tmp_path / "hub" / repository / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held[f"{repository}/{file}"])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return held


def file_of(name: str, file: str) -> Path:
    return HERE / name / file if name.startswith("duo") else HERE / file


def test_the_repository_holds_every_known_policy_to_the_byte():
    assert pretrained.names() == sorted(pretrained.KNOWN)
    for name, known in pretrained.KNOWN.items():
        for file, digest in known.files.items():
            found = hashlib.sha256(file_of(name, file).read_bytes()).hexdigest()
            assert found == digest, f"{name}: {file}"


def test_packed_gate_is_the_gate_bit_for_bit():
    plain = WriteGate.from_pretrained(HERE / f"{GATE}.safetensors")
    packed = WriteGate.from_pretrained(HERE / f"{GATE}.packed.safetensors")
    for name in WEIGHTS:
        mine, other = getattr(plain, name), getattr(packed, name)
        assert mine.dtype == other.dtype == torch.bfloat16
        assert torch.equal(mine.view(torch.int16), other.view(torch.int16)), name
    assert (packed.threshold, packed.window, packed.activation) == (0.1, 64, "gelu")


def test_packed_weights_are_every_bfloat16():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).view(256, 256)
    state = {"y": every[:3], "x": every, "z": every[0, 0]}
    packed = _packed.pack(state)
    assert {x.dtype for x in packed.values()} == {torch.uint8}
    assert {name: x.shape for name, x in packed.items() if name in state} == {
        name: x.shape for name, x in state.items()
    }
    back = _packed.unpack(packed, "here")
    assert back.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(back[name].view(torch.int16), x.view(torch.int16))


def test_damaged_packing_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    state = load_file(HERE / f"{GATE}.packed.safetensors")
    with pytest.raises(TypeError, match="x: wanted torch.bfloat16, got torch.float32"):
        _packed.pack({"x": torch.ones(2)})
    first, coded = min(set(state) - {_packed.EXPONENTS}), state[_packed.EXPONENTS]
    longer = _packed.pack({"x": torch.zeros(1 << 23).bfloat16()})[_packed.EXPONENTS]
    for bad, says in (
        ({first: state[first].int()}, f"{first}: wanted torch.uint8, got torch.int32"),
        ({_packed.EXPONENTS: None}, "exponents: wanted a tensor of that name, got none"),
        ({_packed.EXPONENTS: coded[4:].clone()}, "exponents: wanted deflated bytes"),
        ({_packed.EXPONENTS: coded[: len(coded) // 2].clone()}, r"exponents: wanted \d+, got \d+"),
        ({_packed.EXPONENTS: longer}, r"exponents: wanted \d+, got more"),
    ):
        found = {name: x for name, x in (state | bad).items() if x is not None}
        save_file(found, path, metadata={_packed.KEY: _packed.PACKING})
        with pytest.raises(ValueError, match=f"x.safetensors: {says}"):
            WriteGate.from_pretrained(path)
    save_file(state, path, metadata={_packed.KEY: "zip"})
    with pytest.raises(ValueError, match="packing: wanted 'bfloat16 with .*', got 'zip'"):
        WriteGate.from_pretrained(path)


def test_pack_file_makes_the_file_of_the_wheel(tmp_path):
    out = tmp_path / "out.safetensors"
    _packed.pack_file(HERE / f"{GATE}.safetensors", out)
    there = HERE / f"{GATE}.packed.safetensors"
    with safe_open(out, "pt") as mine, safe_open(there, "pt") as other:
        assert mine.metadata() == other.metadata()
    for name, part in load_file(there).items():
        assert torch.equal(load_file(out)[name], part)


def test_a_folder_comes_before_the_installation(installed, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    for folder, threshold in ((installed, "0.1"), (tmp_path / "mine", "0.7")):
        state = load_file(HERE / f"{GATE}.safetensors")
        save_file(state, folder / f"{GATE}.safetensors", metadata={"threshold": threshold})
    assert WriteGate.from_pretrained(GATE).threshold == 0.1
    assert WriteGate.from_pretrained(pretrained.path(GATE, tmp_path / "mine")).threshold == 0.7
    monkeypatch.setenv(pretrained.ENVIRONMENT, str(tmp_path / "mine"))
    assert WriteGate.from_pretrained(GATE).threshold == 0.7
    (tmp_path / "mine" / f"{GATE}.safetensors").rename(tmp_path / "mine" / "own.safetensors")
    assert pretrained.names() == ["own", GATE]
    assert WriteGate.from_pretrained("own").threshold == 0.7
    assert WriteGate.from_pretrained(GATE).threshold == 0.1


def test_names_are_taken_from_the_hub_to_the_byte(installed, hub):
    assert pretrained.names() == []
    for name in (DUO, ABSENT):
        for file in pretrained.KNOWN[name].files:
            repository = f"kvpolicy/{pretrained.KNOWN[name].repository}"
            hub[f"{repository}/{file}"] = file_of(name, file).read_bytes()
    assert WriteGate.from_pretrained(ABSENT).layers == 30
    assert WriteGate.from_pretrained(f"{ABSENT}.safetensors").layers == 30
    duo = DuoAttention.from_pretrained(DUO, sparsity=0.5)
    assert duo == DuoAttention.from_pretrained(HERE / DUO, sparsity=0.5)
    hub[f"kvpolicy/smollm2-135m-instruct-gates/{ABSENT}.safetensors"] += b" "
    with pytest.raises(ValueError, match=f"gates: {ABSENT}.safetensors: wanted sha256 2e6604e"):
        WriteGate.from_pretrained(ABSENT)


def test_an_absent_policy_is_one_sentence(installed, hub, tmp_path):
    says = (
        f"{ABSENT}: not in this installation, and the hub repository "
        "kvpolicy/smollm2-135m-instruct-gates gave none (ConnectionError); set KVPOLICY_PRETRAINED "
        "to a folder that holds it, such as kvpolicy/pretrained of the source distribution"
    )
    for read in (pretrained.path, WriteGate.from_pretrained):
        with pytest.raises(FileNotFoundError) as raised:
            read(ABSENT)
        assert str(raised.value) == says
    with pytest.raises(FileNotFoundError, match="keep10: not in the folder .*installed"):
        pretrained.path(ABSENT, installed)
    with pytest.raises(FileNotFoundError, match="wanted one of .*keep10.*, got 'nothing'"):
        pretrained.path("nothing")


def test_a_local_path_comes_before_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(DUO).mkdir()
    with pytest.raises(FileNotFoundError, match="holds no full_attention_heads.tsv"):
        DuoAttention.from_pretrained(DUO, sparsity=0.5)
