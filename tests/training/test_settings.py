"""Settings of a training: checked before anything is trained, and shown while it runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpolicy.cli import app
from kvpolicy.cli.progress import StepProgress, described, span
from kvpolicy.training import GateTraining, train_duo_attention, train_write_gate
from tests.support.training.small import TEXT, make_mix, make_model, make_tokenizer

GIVEN = {"steps": 3, "target_keep": 0.3}
WRONG = [
    ({"steps": 0}, "steps: wanted at least 1, got 0"),
    ({"steps": 2.5}, "steps: wanted an int"),
    ({"window": 0}, "window: wanted at least 1, got 0"),
    ({"threshold": 7}, r"threshold: wanted a number in \[0, 1\], got 7"),
    ({"threshold": -0.1}, r"threshold: wanted a number in \[0, 1\], got -0.1"),
    ({"threshold": float("nan")}, "threshold: wanted"),
    ({"target_keep": 1.0}, r"target_keep: wanted a number in \(0, 1\), got 1.0"),
    ({"target_keep": None}, "target_keep, lam: wanted exactly one, got None and None"),
    ({"lam": 0.1}, "target_keep, lam: wanted exactly one, got 0.3 and 0.1"),
    ({"target_keep": None, "lam": -1.0}, "lam: wanted a number of at least 0, got -1.0"),
    ({"length": []}, r"length: wanted one or more, each at least 2, got \[\]"),
    ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
    ({"expand": 0}, "expand: wanted a number above 0, got 0"),
    ({"lr": float("inf")}, "lr: wanted a number above 0, got inf"),
    ({"lr": "fast"}, "lr: wanted a number above 0, got 'fast'"),
    ({"start_lam": 0.0}, "start_lam: wanted a number above 0, got 0.0"),
    ({"ungated": -1}, "ungated: wanted at least 0, got -1"),
    ({"answer_share": 1}, r"answer_share: wanted a number in \[0, 1\), got 1"),
    ({"kernel": "eager"}, "kernel: wanted one of 'auto', .*got 'eager'"),
    ({"eval_every": -1}, "eval_every: wanted at least 0, got -1"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_every_setting_is_checked_before_anything_else(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train_write_gate(None, None, **GIVEN | wrong)  # type: ignore[arg-type]


def test_a_word_that_is_no_setting_is_named():
    with pytest.raises(TypeError, match="'learning_rate'"):
        train_write_gate(None, None, **GIVEN, learning_rate=1e-3)  # type: ignore[arg-type]


def test_settings_and_words_are_the_same(tmp_path):
    settings = GateTraining(steps=5, window=8, batch_size=1, lam=0.1)
    assert settings.length == (4096,) and GateTraining(**GIVEN, length=[64, 96]).length == (64, 96)
    steps = []
    one = train_write_gate(make_model(), make_mix(), settings, steps=2, progress=steps.append)
    other = train_write_gate(make_model(), make_mix(), steps=2, window=8, batch_size=1, lam=0.1)
    assert one.keep == other.keep
    assert [metrics["step"] for metrics in steps] == [1, 2]
    assert {"loss", "keep", "seconds"} < steps[0].keys()


def test_pattern_training_is_checked_too():
    for wrong, message in [
        ({"objective": "kl"}, "objective: wanted one of 'duo', 'wgkv', got 'kl'"),
        ({"steps": 0}, "steps: wanted at least 1, got 0"),
        ({"recent_size": 0}, "sink_size, recent_size: wanted .* got 128 and 0"),
        ({"sink_size": 190, "recent_size": 2}, "together less than the length 192, got 190 and 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_duo_attention(make_model(), make_mix(), **{"steps": 1} | wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT)
    return root


def call(folder, *more):
    """`train-gate` on a tiny model; its exit status and what it said."""
    command = ["train-gate", folder / "model", "--texts", folder / "text.txt", "--device", "cpu"]
    command += ["--out", folder / "gate.safetensors", "--window", 8, "--length", 96, "--lam", 0.1]
    done = CliRunner().invoke(app, [str(word) for word in [*command, "--steps", 3, *more]])
    said = [line for line in done.stderr.splitlines() if not line.startswith("Loading weights")]
    return done.exit_code, [line for line in said if line]


def test_the_command_refuses_before_it_trains(folder, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kvpolicy.cli.train.load", loaded)
    for wrong, message in [
        (("--threshold", 7), "error: threshold: wanted a number in [0, 1], got 7.0"),
        (("--answer-share", 1), "error: answer_share: wanted"),
    ]:
        code, said = call(folder, *wrong)
        assert code == 2 and len(said) == 1 and said[0].startswith(message)
    for dtype in ("nonsense", "int32"):
        assert call(folder, "--dtype", dtype)[0] == 2
    assert not (folder / "gate.safetensors").exists()


@pytest.mark.parametrize("name", ["start.safetensors", "start.pt"])
def test_a_corrupt_start_is_one_line(folder, name):
    (folder / name).write_bytes(b"\x80nothing of the kind")
    code, said = call(folder, "--start", folder / name)
    assert code == 2 and len(said) == 1
    assert said[0].startswith(f"error: {folder / name}: not a readable")


def test_the_command_says_how_far_it_is(folder):
    code, lines = call(folder)
    assert code == 0
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 3" for n in (1, 2, 3)]
    assert all("loss " in line and "% kept" in line for line in lines)
    assert "left" in lines[1] and "left" not in lines[2]


def test_few_lines_of_a_long_training(capsys):
    with StepProgress(1000) as progress:
        for step in range(1, 1001):
            progress.step({"step": step, "loss": 0.25, "heads": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and lines[-1] == "step 1000 of 1000: loss 0.25, mean head weight 0.500"
    with StepProgress(1000, shown=False) as progress:
        progress.step({"step": 50, "loss": 0.25})
    assert capsys.readouterr().err == ""
    assert described({"loss": 0.5, "keep": 0.25}) == "loss 0.5, 25.0% kept"
    assert (span(59), span(61), span(3700)) == ("0:59", "1:01", "1:01:40")


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with StepProgress(4) as progress:
        progress.step({"step": 2, "loss": 0.25, "keep": 0.5})
        (task,) = progress.bar.tasks
        assert (task.completed, task.total) == (2, 4)
        assert task.description == "loss 0.25, 50.0% kept"


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "kvpolicy.training")
    with pytest.raises(ModuleNotFoundError, match=r"accelerate .*'kvpolicy\[train\]'"):
        importlib.import_module("kvpolicy.training")


def test_a_kernel_that_this_device_has_not_is_one_line(folder):
    code, said = call(folder, "--kernel", "flash", "--no-progress")
    assert code == 2 and said == [
        "error: kernel='flash': wanted bfloat16 or float16 on a CUDA device, got torch.float32 on "
        "cpu; write kernel='auto'"
    ]
