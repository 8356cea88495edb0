"""The commands run, print what they say, and name what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvpolicy import DuoAttention, WriteGate
from kvpolicy.adapters.hf import fit_report
from kvpolicy.cli import app
from kvpolicy.evaluation.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of characters, and texts."""
    root = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({chr(n): n for n in range(128)}, unk_token=chr(0)))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=chr(0))
    tokenizer.save_pretrained(root / "model")
    (root / "texts").mkdir()
    text = "".join(chr(97 + (7 * n * n + n // 3) % 26) for n in range(3000))
    (root / "texts" / "one.txt").write_text(text)
    return root


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 1, result.output
    return result.stderr


def test_plan_prints_what_fit_report_says(folder: Path) -> None:
    options = ("plan", folder / "model", "--tokens", 5000, "--admitted", 0.25, "--batch", 2)
    found = json.loads(call(*options, "--dtype", "float32", "--json"))
    wanted = fit_report(tiny_llama().config, 5000, admitted=0.25, batch=2, dtype=torch.float32)
    assert (found["pages"], found["total"]) == (wanted.pages, wanted.total)
    table = call(*options, "--dtype", "float32")
    assert f"{wanted.pages:,}" in table and f"{wanted.kept:.1%} of the tokens kept" in table


def test_plan_reads_policies_from_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.2\n0.9\t0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 8, "recent_size": 64}')
    options = ("plan", folder / "model", "--tokens", 1000, "--duo", tmp_path, "--json")
    found = json.loads(call(*options, "--quest", 128, "--snapkv", 500))
    # Half of the heads hold all 936 global tokens, cut to 436; the others 8 sinks.
    assert found["pages"] == 2 * (-(-436 // 16) + 1) * 16 * 2 * 32 * 2
    assert found["summaries"] > 0 and found["queries"] > 0


def test_train_gate_writes_a_gate_that_loads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates" / "gate.safetensors"
    texts, model = folder / "texts", folder / "model"
    sizes = ("--steps", 2, "--length", 192, "--window", 16, "--batch-size", 1, "--expand", 1)
    said = call(
        "train-gate", model, "--texts", texts, "--out", out, "--target-keep", 0.5, *sizes,
        "--device", "cpu", "--run-dir", tmp_path / "run", "--ungated", 3, "--save-every", 1,
    )  # fmt: skip
    assert said.startswith(str(out)) and "window 16" in said
    gate = WriteGate.from_pretrained(out)
    assert (gate.layers, gate.kv_heads, gate.width, gate.window) == (2, 2, 32, 16)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    wider = tmp_path / "wider.pt"
    options = ("--texts", texts, "--out", wider, "--lam", 0.1, "--start", out, "--device", "cpu")
    more = ("--length", 96, "--answer-share", 0.5, "--run-dir", tmp_path / "more")
    said = call("train-gate", model, *options, *sizes, *more)
    assert said.startswith(f"{wider}: lambda 0.1,") and WriteGate.from_pretrained(wider)
    settings = torch.load(tmp_path / "more" / "state.pt", weights_only=False)["settings"]
    assert settings["length"] == [192, 96] and settings["answer_share"] == 0.5


def test_train_duo_writes_a_pattern_that_loads(folder: Path, tmp_path: Path) -> None:
    texts, model = folder / "texts", folder / "model"
    sizes = ("--steps", 2, "--length", 192, "--window", 16, "--sinks", 4)
    call(
        "train-duo", model, "--texts", texts, "--out", tmp_path / "duo", *sizes,
        "--objective", "wgkv", "--device", "cpu",
    )  # fmt: skip
    duo = DuoAttention.from_pretrained(tmp_path / "duo", sparsity=0.5)
    assert (duo.sinks, duo.window, duo.sparsity) == (4, 16, 0.5)


def test_training_takes_a_data_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    module = types.ModuleType("datasets")

    def load_dataset(*names: object, **options: object) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": (folder / "texts" / "one.txt").read_text()}]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    call(
        "train-gate", folder / "model", "--dataset", "some/set", "--subset", "10BT", "--lam", 0.1,
        "--out", tmp_path / "gate.pt", "--steps", 1, "--length", 192, "--device", "cpu",
    )  # fmt: skip
    assert asked == [(("some/set", "10BT"), {"split": "train", "streaming": True})]
    said = fails("train-gate", folder / "model", "--out", "g.pt", "--lam", 0.1)
    assert said == "error: texts, dataset: wanted exactly one\n"


def test_calibrate_reports_the_knob_that_gives_a_size(folder: Path, tmp_path: Path) -> None:
    options = ("--texts", folder / "texts", "--length", 200, "--prompts", 1, "--device", "cpu")
    said = call(
        "calibrate", folder / "model", *options, "--snapkv", "--window", 32, "--tokens", 100
    )
    value, tokens = re.match(r"budget (\d+): ([\d.]+) tokens per head, ", said).groups()
    assert float(value) == float(tokens) == pytest.approx(100, rel=0.02)
    assert "reached tokens 100 after" in said
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.2\n0.9\t0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 8, "recent_size": 64}')
    found = json.loads(
        call(
            "calibrate", folder / "model", *options, "--duo", tmp_path, "--target", "68%", "--json"
        )
    )
    assert found["knob"] == "sparsity" and found["best"]["size"]["tokens"] == (2 * 200 + 2 * 72) / 4
    said = fails("calibrate", folder / "model", *options, "--snapkv")
    assert "error: target, tokens, bytes: wanted exactly one" in said


def test_inspect_reports_and_shows(folder: Path, tmp_path: Path) -> None:
    options = ("--texts", folder / "texts", "--out", tmp_path, "--device", "cpu")
    sizes = ("--length", 200, "--continuation", 8, "--window", 32)
    said = call("inspect", folder / "model", *options, *sizes, "--snapkv", 80)
    assert said.startswith("200 tokens: KL ") and "40.0% kept" in said
    assert "eviction SnapKV: " in said
    record = json.loads((tmp_path / "fidelity.json").read_text())
    assert len(record["kl"]) == 9 and record["mean_kl"] > 0
    assert [len(row) for row in record["lost_mass"]] == [4, 4]
    assert "<span data-i" in (tmp_path / "kept.html").read_text()
    assert (tmp_path / "kept.png").read_bytes()[:4] == b"\x89PNG"
    said = fails("inspect", folder / "model", *options)
    assert said.startswith("error: gate, duo, window, quest, snapkv: wanted at least one")


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    texts, model = folder / "texts", folder / "model"
    said = fails("train-gate", model, "--texts", texts, "--out", tmp_path / "gate.bin")
    assert said.startswith("error: out: wanted a name ending in") and said.count("\n") == 1
    said = fails("train-gate", model, "--texts", texts, "--out", "g.pt", "--length", 99)
    assert "target_keep" in said
    said = fails("train-duo", model, "--texts", tmp_path, "--out", tmp_path / "duo")
    assert said.startswith("error: texts: no .txt file")
    said = fails("plan", model, "--gate", "a", "--duo", "b")
    assert said.startswith("error: gate, duo: wanted at most one")


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    module = types.ModuleType("kvpolicy.bench")

    def run(names: list[str], **options: object) -> list[object]:
        seen.append((names, options))
        return [types.SimpleNamespace(error="broken" if "bad" in names else "")]

    module.run = run
    monkeypatch.setitem(sys.modules, "kvpolicy.bench", module)
    call("bench", "decode", "--quick", "--seconds", 5, "--out", "results")
    assert seen == [(["decode"], {"out": "results", "quick": True, "seconds": 5.0})]
    fails("bench", "bad")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kvpolicy.cli import app\n"
        "out = CliRunner().invoke(app, ['--help']).output\n"
        "print(all(name in out for name in ('plan', 'train-gate', 'pareto', 'evaluate')))\n"
        "print([n for n in ('transformers', 'triton', 'accelerate') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["True", "[]"], done.stderr
