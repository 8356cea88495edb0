"""DuoAttention: pattern directories and their binarisation."""

from __future__ import annotations

import json

import attrs
import numpy as np
import pytest
import torch

from kvpolicy.admission import DuoAttention, _duo_file


@pytest.fixture
def folder(tmp_path):
    """Writes a pattern directory as the original does."""

    def write(values, config=None):
        np.savetxt(tmp_path / "full_attention_heads.tsv", np.array(values), delimiter="\t")
        config = {"sink_size": 8, "recent_size": 32, "lr": 0.02} if config is None else config
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def random_values(layers=5, heads=4):
    # Some values lie outside [0, 1], as in published patterns.
    return np.random.RandomState(3).uniform(-0.1, 1.1, (layers, heads))


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.77, 0.99])
def test_binarisation_is_the_published_rule(folder, sparsity):
    values = random_values()
    duo = DuoAttention.from_pretrained(folder(values), sparsity=sparsity)
    noisy = np.clip(values, 0, 1) + np.random.RandomState(42).uniform(0, 1e-6, values.shape)
    full = noisy >= np.quantile(noisy, sparsity)
    assert duo.full_heads == tuple(map(tuple, full.tolist()))
    assert duo.sparsity == pytest.approx(1 - full.mean())
    assert abs(duo.sparsity - sparsity) <= 1 / values.size


def test_ends_of_sparsity(folder):
    path = folder(random_values())
    everything = DuoAttention.from_pretrained(path, sparsity=0)
    assert (everything.sparsity, everything.neutral) == (0, True)
    nothing = DuoAttention.from_pretrained(path, sparsity=1)
    assert (nothing.sparsity, nothing.neutral) == (1, False)


def test_ties_are_broken_by_the_seed_alone(folder):
    path = folder(np.full((6, 4), 0.5))
    first, again, other = (
        DuoAttention.from_pretrained(path, sparsity=0.5, seed=seed) for seed in (42, 42, 43)
    )
    assert first == again
    assert first.full_heads != other.full_heads
    assert first.sparsity == other.sparsity == 0.5


def test_noise_never_reorders_values(folder):
    values = np.arange(24).reshape(6, 4)[::-1] * 1e-5
    duo = DuoAttention.from_pretrained(folder(values), sparsity=0.5)
    assert duo.full_heads == tuple(map(tuple, (values >= 12e-5).tolist()))


def test_threshold_compares_clipped_values(folder):
    path = folder([[0.2, 0.5], [1.3, -0.1]])
    duo = DuoAttention.from_pretrained(path, threshold=0.5)
    assert duo.full_heads == ((False, True), (True, False))
    assert DuoAttention.from_pretrained(path, threshold=1.0).full_heads[1] == (True, False)
    assert DuoAttention.from_pretrained(path, threshold=0.0).neutral


def test_config_gives_sinks_and_window_and_arguments_win(folder):
    path = folder(random_values())
    duo = DuoAttention.from_pretrained(path, sparsity=0.5)
    assert (duo.sinks, duo.window) == (8, 32)
    duo = DuoAttention.from_pretrained(path, sparsity=0.5, sinks=0, window=1)
    assert (duo.sinks, duo.window) == (0, 1)


@pytest.mark.parametrize("placed", [False, True])
def test_streaming_heads_admit_sinks_only(make_write, placed):
    duo = DuoAttention(full_heads=((True, True), (False, True)), sinks=3, window=8)
    if placed:
        duo = duo.place(torch.device("cpu"), torch.float32, "reference")
    write = make_write(tokens=5, kv_heads=2, layer=1, start=1)
    assert duo.admit(write).tolist() == [[True, True, False, False, False], [True] * 5]
    shard = make_write(tokens=5, kv_heads=2, layer=1, start=1, heads=range(1, 2))
    assert duo.admit(shard).tolist() == [[True] * 5]
    assert duo.admit(make_write(tokens=5, kv_heads=2, start=9)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("0.1\t0.2\n0.3", "line 2: wanted 2 columns as in line 1, got 1"),
        ("0.1\t0.2\n0.3\t0.4\t0.5", "line 2: wanted 2 columns"),
        ("0.1\t0.2\n\n0.3\t0.4", "line 2: could not convert"),
        ("0.1\tx", "line 1: could not convert"),
        ("0.1 0.2", "line 1: could not convert"),
        ("0.1\tnan", "line 1: wanted finite numbers"),
        ("inf\t0.1", "line 1: wanted finite numbers"),
    ],
)
def test_a_broken_pattern_names_the_line(folder, text, message):
    path = folder([[0.1]])
    (path / "full_attention_heads.tsv").write_text(text)
    with pytest.raises(ValueError, match=rf"full_attention_heads\.tsv: .*{message}"):
        DuoAttention.from_pretrained(path, sparsity=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sink_size": 4}, "recent_size: wanted an int of at least 1, got no such key"),
        ({"recent_size": 4}, "sink_size: .*no such key"),
        ({"sink_size": -1, "recent_size": 4}, "sink_size: .*got -1"),
        ({"sink_size": 4, "recent_size": 0}, "recent_size: .*got 0"),
        ({"sink_size": "4", "recent_size": 4}, "sink_size: .*got '4'"),
        ({"sink_size": True, "recent_size": 4}, "sink_size: .*got True"),
        ([], "wanted an object, got list"),
        ({"sink_size": 10**30, "recent_size": 4}, "sink_size: wanted at most 1,073,741,824 tokens"),
    ],
)
def test_a_broken_config_names_the_key(folder, config, message):
    path = folder([[0.1]], config)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        DuoAttention.from_pretrained(path, sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[" * 100_000, "not JSON"),
        ("config.json", b'{"sink_size": ' + b"9" * 5000 + b"}", "not JSON"),
        ("config.json", b"\xff\xfe{}", "not a text in UTF-8"),
        ("full_attention_heads.tsv", b"0.5\t\xff", "not a text in UTF-8"),
    ],
)
def test_damaged_bytes_name_the_file(folder, name, content, message):
    path = folder([[0.1]])
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        DuoAttention.from_pretrained(path, sparsity=0.5)


def test_what_is_written_is_read(tmp_path):
    values = [[0.25, 1.0], [0.0, 0.1234567891]]
    _duo_file.write(tmp_path / "new", values, {"sink_size": 4, "recent_size": 9, "lr": 0.02})
    assert _duo_file.read(tmp_path / "new") == (values, {"sink_size": 4, "recent_size": 9})
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_missing_files_are_named(folder, tmp_path):
    path = folder([[0.1]])
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        DuoAttention.from_pretrained(path, sparsity=0.5)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        DuoAttention.from_pretrained(path, sparsity=0.5)
    with pytest.raises(FileNotFoundError, match="path_or_repo: no directory"):
        DuoAttention.from_pretrained(tmp_path / "nowhere", sparsity=0.5)


def test_a_hub_repository_is_asked_for_both_files(folder, monkeypatch):
    path, asked = folder([[0.1, 0.9]]), []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, sorted(allow_patterns)))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    duo = DuoAttention.from_pretrained("owner/pattern", sparsity=0.5, revision="v1")
    assert duo.full_heads == ((False, True),)
    assert asked == [("owner/pattern", "v1", ["config.json", "full_attention_heads.tsv"])]


def test_exactly_one_rule_is_named(folder):
    path = folder([[0.1]])
    for arguments in ({}, {"sparsity": 0.5, "threshold": 0.5}):
        with pytest.raises(ValueError, match="sparsity, threshold: wanted exactly one"):
            DuoAttention.from_pretrained(path, **arguments)
    for sparsity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sparsity: wanted a number in"):
            DuoAttention.from_pretrained(path, sparsity=sparsity)


def test_check_names_both_numbers():
    duo = DuoAttention(full_heads=((True, False),) * 3)
    duo.check(3, 2, 64)
    with pytest.raises(ValueError, match=r"layers=3.*layers=4"):
        duo.check(4, 2, 64)
    with pytest.raises(ValueError, match=r"kv_heads=2.*kv_heads=8"):
        duo.check(3, 8, 64)


def test_a_pattern_is_a_value():
    duo = DuoAttention(full_heads=[[True, False]])
    placed = duo.place(torch.device("cpu"), torch.float32, "reference")
    assert duo == placed == DuoAttention(full_heads=((True, False),))
    assert len({duo, placed}) == 1
    assert repr(duo) == "DuoAttention(full_heads=<1x2>, sinks=128, window=256)"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        duo.sinks = 4
