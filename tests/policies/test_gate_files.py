"""Gate files: the published layout, and every way in which a file can be wrong."""

from __future__ import annotations

import pathlib
import pickle
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpolicy.admission import WriteGate

PREFIX = "model.layers.{}.self_attn.g_predictors."


def key(layer, name):
    return PREFIX.format(layer) + name


def save(path, state, metadata=None):
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        plain = {name: value.detach() for name, value in state.items()}
        save_file(plain, path, metadata=metadata)
    return path


@pytest.mark.parametrize("name", ["gate.pt", "gate.safetensors"])
def test_published_layout_is_read(tmp_path, gate_state, make_write, name):
    state = gate_state()
    gate = WriteGate.from_pretrained(save(tmp_path / name, state))
    assert (gate.layers, gate.kv_heads, gate.width, gate.head_dim) == (2, 3, 24, 16)
    assert (gate.threshold, gate.window) == (0.1, 256)
    assert not gate.w1.requires_grad
    # Rows of conv1 are head-major: row h * m + r is unit r of head h.
    assert torch.equal(gate.w1[1, 2, 5], state[key(1, "conv1.weight")][2 * 24 + 5, :, 0])
    assert torch.equal(gate.b1[1, 2, 5], state[key(1, "conv1.bias")][2 * 24 + 5])
    assert torch.equal(gate.w2[0, 1], state[key(0, "conv2.weight")][1, :, 0])
    assert torch.equal(gate.b2[0], state[key(0, "conv2.bias")])
    assert torch.equal(gate.norm_pre[1], state[key(1, "pre_key_norm.weight")])
    assert torch.equal(gate.norm_post[1], state[key(1, "post_key_norm.weight")])
    assert gate.admit(make_write(layer=1)).shape == (3, 40)


@pytest.mark.parametrize("name", ["gate.pt", "gate.safetensors"])
def test_save_writes_the_published_layout(tmp_path, gate_state, name):
    state = gate_state()
    gate = WriteGate.from_pretrained(save(tmp_path / "in.pt", state), threshold=0.25, window=64)
    gate.save(tmp_path / name)
    if name.endswith(".pt"):
        written = torch.load(tmp_path / name, weights_only=True)
        assert type(written) is dict
    else:
        written = load_file(tmp_path / name)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    again = WriteGate.from_pretrained(tmp_path / name)
    kept = (0.25, 64) if name.endswith(".safetensors") else (0.1, 256)
    assert (again.threshold, again.window) == kept
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in written.values())


def test_save_wants_a_known_suffix(tmp_path, gate_state):
    gate = WriteGate.from_pretrained(save(tmp_path / "gate.pt", gate_state()))
    with pytest.raises(ValueError, match=r"path: .*\.pt or \.safetensors.*gate\.bin"):
        gate.save(tmp_path / "gate.bin")


def test_metadata_is_the_default_and_arguments_win(tmp_path, gate_state):
    metadata = {"window": "32", "threshold": "0.5", "model": "a"}
    path = save(tmp_path / "gate.safetensors", gate_state(), metadata)
    gate = WriteGate.from_pretrained(path)
    assert (gate.window, gate.threshold) == (32, 0.5)
    gate = WriteGate.from_pretrained(path, window=16, threshold=0.0)
    assert (gate.window, gate.threshold) == (16, 0.0)


def test_the_activation_is_an_argument_or_metadata(tmp_path, gate_state):
    """The tensors do not tell gelu from silu."""
    plain = save(tmp_path / "plain.pt", gate_state())
    assert WriteGate.from_pretrained(plain).activation == "gelu"
    gate = WriteGate.from_pretrained(plain, activation="silu")
    gate.save(tmp_path / "named.safetensors")
    assert WriteGate.from_pretrained(tmp_path / "named.safetensors").activation == "silu"
    with pytest.raises(ValueError, match="activation: wanted one of 'gelu', 'silu', got 'relu'"):
        WriteGate.from_pretrained(plain, activation="relu")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"window": "wide"}, "metadata window"),
        ({"window": "0"}, "window: wanted at least 1"),
        ({"threshold": "x"}, "metadata threshold"),
        ({"threshold": "nan"}, "threshold: wanted"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, gate_state, metadata, message):
    path = save(tmp_path / "gate.safetensors", gate_state(), metadata)
    with pytest.raises(ValueError, match=message):
        WriteGate.from_pretrained(path)


def drop(name):
    return lambda state: state.pop(name)


def put(name, change):
    return lambda state: state.update({name: change(state.get(name))})


def nan_in(value):
    value = value.detach().clone()
    value.view(-1)[3] = float("nan")
    return value


def with_value(state):
    for n in range(2):
        state[key(n, "value_norm.weight")] = torch.ones(16)


def skip_a_layer(state):
    for name in [name for name in state if name.startswith("model.layers.1.")]:
        state[name.replace("layers.1.", "layers.2.")] = state.pop(name)


BROKEN = [
    (drop(key(1, "conv2.bias")), r"missing key model\.layers\.1\..*conv2\.bias"),
    (drop(key(0, "pre_key_norm.weight")), r"missing key .*layers\.0\..*pre_key_norm\.weight"),
    (skip_a_layer, r"missing key .*layers\.1\."),
    (put("lm_head.weight", lambda _: torch.ones(2)), "unexpected key lm_head.weight"),
    (with_value, r"unexpected key .*value_norm\.weight"),
    (put(key(1, "conv1.weight"), lambda v: v[:, 1:].contiguous()), r"layers\.1\..*conv1\.weight"),
    (put(key(0, "conv1.weight"), lambda v: v[1:].contiguous()), r"layers\.0\..*conv1\.weight"),
    (put(key(0, "conv1.weight"), lambda v: v[..., 0].contiguous()), r"layers\.0\..*conv1\.weight"),
    (put(key(0, "conv1.bias"), lambda v: v[1:].contiguous()), r"layers\.0\..*conv1\.bias"),
    (put(key(0, "conv2.weight"), lambda v: v[:, 1:].contiguous()), r"layers\.0\..*conv2\.weight"),
    (put(key(0, "conv2.bias"), lambda v: v[1:].contiguous()), r"conv2\.bias"),
    (put(key(0, "pre_key_norm.weight"), lambda v: v[1:].contiguous()), r"pre_key_norm\.weight"),
    (put(key(1, "post_key_norm.weight"), lambda v: v[1:].contiguous()), r"post_key_norm\.weight"),
    (put(key(1, "conv1.bias"), nan_in), r"layers\.1\..*conv1\.bias holds NaN"),
    (put(key(0, "conv2.bias"), lambda v: v / 0), r"conv2\.bias holds NaN or inf"),
    (put(key(1, "conv2.bias"), lambda v: v.int()), r"layers\.1\..*conv2\.bias.*int32"),
    (put(key(0, "conv2.bias"), lambda v: v[:0].contiguous()), "wanted shape"),
    (lambda state: state.clear(), "no key like model.layers.0"),
]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_broken_file_names_the_key(tmp_path, gate_state, damage, message, suffix):
    state = gate_state()
    damage(state)
    path = save(tmp_path / f"gate{suffix}", state)
    with pytest.raises(ValueError, match=message):
        WriteGate.from_pretrained(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "wanted a dict of tensors, got list"),
        ({key(0, "conv1.weight"): 1.0}, "missing key"),
    ],
)
def test_a_pt_file_holds_a_dict_of_tensors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        WriteGate.from_pretrained(save(tmp_path / "gate.pt", content))


def test_a_value_that_is_no_tensor_is_named(tmp_path, gate_state):
    state = gate_state() | {key(1, "conv2.bias"): "x"}
    with pytest.raises(ValueError, match=r"layers\.1\..*conv2\.bias: wanted .*got str"):
        WriteGate.from_pretrained(save(tmp_path / "gate.pt", state))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint ran')",))


def test_a_pt_file_runs_no_code(tmp_path):
    torch.save({"x": Evil()}, tmp_path / "gate.pt")
    with pytest.raises(ValueError, match="not a readable file of plain tensors"):
        WriteGate.from_pretrained(tmp_path / "gate.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="not a readable file of plain tensors"):
        WriteGate.from_pretrained(tmp_path / "old.pt")


@pytest.mark.parametrize("name", ["gate.pt", "gate.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html>"])
def test_a_file_of_other_bytes_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a readable"):
        WriteGate.from_pretrained(tmp_path / name)


def test_a_directory_needs_a_file(tmp_path, gate_state):
    save(tmp_path / "gate.pt", gate_state())
    assert WriteGate.from_pretrained(tmp_path, "gate.pt").layers == 2
    with pytest.raises(ValueError, match="file: .* is a directory"):
        WriteGate.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="file: .* is a file already"):
        WriteGate.from_pretrained(tmp_path / "gate.pt", "gate.pt")
    with pytest.raises(FileNotFoundError, match=r"path_or_repo: no file .*other\.pt"):
        WriteGate.from_pretrained(tmp_path, "other.pt")
    with pytest.raises(FileNotFoundError, match="needs `file`"):
        WriteGate.from_pretrained("owner/gates")
    (tmp_path / "gate.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ending in \.pt or \.safetensors"):
        WriteGate.from_pretrained(tmp_path / "gate.bin")


def test_a_hub_repository_is_asked_for_the_file(tmp_path, gate_state, monkeypatch):
    path, asked = save(tmp_path / "gate.pt", gate_state()), []

    def download(repo, file, *, revision):
        asked.append((repo, file, revision))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    gate = WriteGate.from_pretrained("owner/gates", "a/gate.pt", revision="main")
    assert (gate.layers, asked) == (2, [("owner/gates", "a/gate.pt", "main")])


def expanded(name, shape):
    """A tensor that says to be large and holds one number."""
    return lambda state: state.update({name: torch.zeros(1).expand(shape)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (expanded(key(0, "conv1.weight"), 2**45), r"layers\.0\..*conv1\.weight: wanted shape"),
        (expanded(key(1, "conv2.bias"), (2**30, 2**30)), r"layers\.1\..*conv2\.bias: wanted shape"),
        (expanded(key(1, "conv1.weight"), (72, 32, 1)), "stand for .* bytes, the file has"),
        (expanded(key(0, "conv2.bias"), 2**40), "wanted shape"),
    ],
)
def test_no_value_is_read_on_the_file_s_word(tmp_path, gate_state, damage, message, monkeypatch):
    """A tensor of stride 0 has any number of elements in a file of 3 KB."""
    state = gate_state(layers=2)
    damage(state)
    path = save(tmp_path / "gate.pt", state)
    read = []
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: read.append(self))
    with pytest.raises(ValueError, match=rf"gate\.pt: .*{message}"):
        WriteGate.from_pretrained(path)
    assert not read


def test_layers_may_not_share_their_memory(tmp_path, gate_state):
    """A file of 1 MB with a thousand layers of one storage would be a GB."""
    state = gate_state()
    for name in [name for name in state if ".0." in name]:
        for layer in range(1, 9):
            state[name.replace(".0.", f".{layer}.")] = state[name]
    path = save(tmp_path / "gate.pt", state)
    assert path.stat().st_size < sum(v.nbytes for v in state.values())
    with pytest.raises(ValueError, match=r"gate\.pt: its keys stand for .* must not share"):
        WriteGate.from_pretrained(path)


def test_a_deflated_file_is_refused_before_it_is_unpacked(tmp_path, gate_state, monkeypatch):
    state = gate_state() | {"padding": torch.zeros(1 << 20)}
    plain = save(tmp_path / "plain.pt", state)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "gate.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"gate\.pt: not a readable .* bytes unpack to 4,"):
        WriteGate.from_pretrained(tmp_path / "gate.pt")


def test_a_truncated_or_altered_file_is_named(tmp_path, gate_state):
    """Wherever the damage is: torch, pickle and zip raise a dozen kinds of errors."""
    path = save(tmp_path / "gate.pt", gate_state())
    whole, rng, accepted = path.read_bytes(), random.Random(0), 0
    cuts = [whole[:n] for n in range(0, len(whole), len(whole) // 60)]
    for _ in range(60):
        at = rng.randrange(len(whole))
        cuts.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for content in cuts:
        path.write_bytes(content)
        try:
            WriteGate.from_pretrained(path)
            accepted += 1  # a bit of a weight
        except ValueError as error:
            assert "gate.pt" in str(error)
    assert accepted < len(cuts) / 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(3).to_sparse(), "sparse_coo on cpu"),
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
    ],
)
def test_other_kinds_of_tensors_are_named(tmp_path, gate_state, value, kind):
    path = save(tmp_path / "gate.pt", gate_state() | {key(1, "conv2.bias"): value})
    with pytest.raises(ValueError, match=rf"gate\.pt: .*conv2\.bias: wanted a float.*got .*{kind}"):
        WriteGate.from_pretrained(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layers_of_two_dtypes_are_refused(tmp_path, gate_state, suffix):
    state = gate_state()
    state[key(1, "conv1.bias")] = state[key(1, "conv1.bias")].to(torch.float16)
    path = save(tmp_path / f"gate{suffix}", state)
    with pytest.raises(ValueError, match=r"layers\.1\..*conv1\.bias: wanted torch\.float32 as in"):
        WriteGate.from_pretrained(path)


def test_metadata_out_of_range_names_the_file(tmp_path, gate_state):
    path = save(tmp_path / "gate.safetensors", gate_state(), {"threshold": "7"})
    with pytest.raises(ValueError, match=r"gate\.safetensors: metadata threshold: wanted .*got 7"):
        WriteGate.from_pretrained(path)
    assert WriteGate.from_pretrained(path, threshold=0.5).threshold == 0.5


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, gate_state, monkeypatch, suffix):
    gate = WriteGate.from_pretrained(save(tmp_path / "in.pt", gate_state()))
    gate.save(tmp_path / f"gate{suffix}")
    before = (tmp_path / f"gate{suffix}").read_bytes()

    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        attrs.evolve(gate, b2=gate.b2 + 1).save(tmp_path / f"gate{suffix}")
    assert (tmp_path / f"gate{suffix}").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.pt", f"gate{suffix}"])


def test_threads_may_save_to_one_path(tmp_path, gate_state):
    gate = WriteGate.from_pretrained(save(tmp_path / "in.pt", gate_state()))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(gate.save, [tmp_path / "gate.pt"] * 40))
    assert torch.equal(WriteGate.from_pretrained(tmp_path / "gate.pt").w1, gate.w1)
    assert len(list(tmp_path.iterdir())) == 2
