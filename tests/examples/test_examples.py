"""The examples run on tiny models, and what they print took effect."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvpolicy.evaluation.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(out: str) -> list[list[str]]:
    """Cells of the table rows in `out`."""
    lines = [line for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_compose_shows_every_triple(capsys: pytest.CaptureFixture) -> None:
    load("compose").main(["--tokens", "300", "--new-tokens", "18"])
    found = {tuple(row[:3]): row[3:] for row in rows(capsys.readouterr().out)}
    slots = [list(dict.fromkeys(names)) for names in zip(*found, strict=True)]
    assert [len(names) for names in slots] == [6, 2, 4]
    assert set(found) == set(itertools.product(*slots))
    dense = found["all", "all", "none"]
    assert dense == ["100%", "317", "0", "317", dense[4], "100%"]
    for (admission, selection, eviction), row in found.items():
        _, stored, evicted, read, size, _ = (int(re.sub(r"[%,]", "", cell)) for cell in row)
        if (admission, eviction) != ("all", "none"):
            assert stored < 317 and size < int(dense[4].replace(",", ""))
        if selection == "quest":
            assert read <= 64
        if eviction == "none":
            assert evicted == 0
        if admission == "all" and eviction != "none":
            assert evicted > 0


def test_plan_memory_lists_both_shapes(capsys: pytest.CaptureFixture) -> None:

    load("plan_memory").main(["--tokens", "100000"])
    found = {row[0]: row[1:] for row in rows(capsys.readouterr().out)}
    assert set(found) == {"Llama-3.1-8B", "Qwen3-4B"}
    tokens, weights, full, *_ = found["Llama-3.1-8B"]
    assert (tokens, weights, full) == ("100,000", "14.96", "12.21")
    assert all(float(x[3]) < 0.25 * float(x[2]) for x in found.values())


def test_plan_memory_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path)
    load("plan_memory").main(["--model", str(tmp_path), "--tokens", "4000", "--admitted", "0"])
    assert "6.4%" in capsys.readouterr().out  # the window alone: 256 of 4000


def test_long_document_forks_and_talks(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--tokens", "600", "--new-tokens", "8", "--budget", "160"]
    load("long_document").main(arguments)
    found = {row[0]: row[1:] for row in rows(capsys.readouterr().out)}
    assert found["document again"] == found["document"]  # forks left it as it was
    assert found["fork 2"] == found["fork 3"]  # and gave their pages back
    assert int(found["fork 1"][0]) == 600 + 24 + 8 - 1
    assert int(found["turn 3"][0]) == 600 + 3 * (24 + 8) - 1
    assert int(found["turn 3"][3]) > int(found["turn 1"][3]) > 0  # evicted
    assert all(int(found[f"turn {n}"][4]) <= 80 for n in (1, 2, 3))  # read


@pytest.mark.parametrize("model", ["llama", "qwen"])
@pytest.mark.parametrize("duo", [False, True])
def test_published_layouts_load(model: str, duo: bool, capsys: pytest.CaptureFixture) -> None:
    extra = ["--duo", "ignored", "--quest", "400", "--snapkv", "300"] if duo else []
    load("published_checkpoints").main([model, "--dry-run", "--new-tokens", "17", *extra])
    out = capsys.readouterr().out
    policy = "DuoAttention" if duo else "WriteGate"
    assert f"admission        {policy}, window 256" in out
    admitted = float(re.search(r"^admitted +([\d.]+)%", out, re.MULTILINE)[1])
    assert 20 < admitted < 80
    read = int(re.search(r"^read per token +(\d+)", out, re.MULTILINE)[1])
    assert read <= 400 if duo else 256 < read < 717
    share = float(re.search(r"\(([\d.]+)% of a full cache\)", out)[1])
    assert share < 100


def test_published_gate_has_the_published_shapes(tmp_path: Path) -> None:
    example = load("published_checkpoints")
    example.rehearse(example.MODELS["qwen"], tmp_path)
    state = torch.load(tmp_path / "qwen3-4b-instruct-2507-0.16.pt", weights_only=True)
    assert len(state) == 12
    first = state["model.layers.0.self_attn.g_predictors.conv1.weight"]
    assert first.shape == (2 * 48, 64, 1)
