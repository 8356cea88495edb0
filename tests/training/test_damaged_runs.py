"""Folders of runs whose files are damaged, or were written by something else."""

from __future__ import annotations

import json
import random

import pytest
import torch

from kvpolicy.training import train_write_gate
from tests.support.training.small import make_mix, make_model

OPTIONS = {"steps": 2, "window": 8, "batch_size": 1, "target_keep": 0.3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The two files of a run that has made one of its two steps."""
    folder = tmp_path_factory.mktemp("run")
    train_write_gate(make_model(), make_mix(), **OPTIONS, out_dir=folder, stop_after=1)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "state.pt"]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path, written):
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def resume(folder):
    return train_write_gate(make_model(), make_mix(), **OPTIONS, out_dir=folder)


def edited(folder, change):
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save(change(state), folder / "state.pt")


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [state], "wanted the state of a run, got list"),
        (without("step"), "step: wanted a number of steps, got no such key"),
        (without("gates"), "gates: wanted a dict, got no such key"),
        (without("controller"), "controller: wanted a dict, got no such key"),
        (lambda state: state | {"step": "1"}, "step: wanted a number of steps, got str"),
        (lambda state: state | {"step": -1}, "step: wanted a number of steps, got int"),
        (lambda state: state | {"settings": 3}, "settings: wanted a dict, got int"),
        (lambda state: state | {"gates": {}}, "gates: wanted one that fits"),
        (lambda state: state | {"optimizer": {}}, "optimizer: wanted one that fits"),
        (lambda state: state | {"controller": {"x": 1}}, "controller: wanted one that fits"),
        (
            lambda state: state | {"controller": state["controller"] | {"keep": "x"}},
            "controller: wanted one that fits this run, got keep: wanted a number",
        ),
    ],
)
def test_a_state_that_is_another_format_is_named(run, change, message):
    edited(run, change)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"state\.pt: {message}"):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_damaged_state_is_named(run, written):
    whole, rng = written["state.pt"], random.Random(0)
    step = len(whole) // 12
    for content in [b"", b"<!doctype html>", *(whole[:n] for n in range(step, len(whole), step))]:
        (run / "state.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt: not a readable file of plain tensors"):
            resume(run)
    torch.save({"x": rng}, run / "state.pt")  # an object that only its own code can build
    with pytest.raises(ValueError, match=r"state\.pt: not a readable file of plain tensors"):
        resume(run)


@pytest.mark.parametrize("line", ["{", "[1]", "7", '{"loss": 1}', '{"step": "x"}', "[" * 50_000])
def test_a_damaged_line_of_metrics_is_named(run, line):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: wanted the metrics of a step"):
        resume(run)


def test_a_state_of_0_1_0_is_gone_on_from(run):
    """It noted fewer settings down."""
    older = {
        "model", "steps", "window", "target_keep", "lam", "batch_size", "length", "answer_share",
        "threshold", "lr", "seed", "ungated", "processes",
    }  # fmt: skip

    def change(state):
        assert older < state["settings"].keys()
        return state | {"settings": {name: state["settings"][name] for name in older}}

    edited(run, change)
    resume(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_state_of_other_settings_is_refused(run):
    with pytest.raises(ValueError, match=r"holds a run of another expand: 4\.0"):
        train_write_gate(make_model(), make_mix(), **OPTIONS, out_dir=run, expand=2.0)


def test_a_save_that_fails_leaves_the_old_state(run, written, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            resume(run)
    assert (run / "state.pt").read_bytes() == written["state.pt"]
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "state.pt"]
