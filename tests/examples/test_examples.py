"""The examples run on tiny models, and what they print took effect."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvpolicy.adapters.hf import spec_of
from kvpolicy.evaluation.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    if str(ROOT / "examples") not in sys.path:  # where `python examples/...` looks first
        sys.path.append(str(ROOT / "examples"))
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
    out = capsys.readouterr().out
    found = {tuple(row[:3]): row[3:] for row in rows(out)}
    slots = [list(dict.fromkeys(names)) for names in zip(*found, strict=True)]
    assert [len(names) for names in slots] == [6, 2, 4]
    assert set(found) == set(itertools.product(*slots))
    dense = found["all", "all", "none"]
    # Half of the heads want none of the window's 32 tokens, nor of the 17 that left it since.
    assert found["all", "all", "duo at prompt end"][0] == f"{1 - (32 + 17) / 2 / 317:.0%}"
    assert "lose their flag" in " ".join(out.split())
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


@pytest.mark.slow
def test_each_slot_has_a_script_whose_rows_take_effect(capsys: pytest.CaptureFixture) -> None:
    load("evictions").main(["--tokens", "300", "--new-tokens", "4"])
    found = {row[0]: row[1:] for row in rows(capsys.readouterr().out)}
    assert len(found) == len(load("evictions").evictions(75)) + 10
    for name, (stored, evicted, *_, composed, lost, read, part) in found.items():
        assert int(evicted) > 0 and int(stored) < 303, name
        assert int(composed) < 303 and int(read) < int(composed) and int(part[:-1]) < 100, (
            name,
            lost,
        )
    load("selections").main(["--tokens", "300", "--new-tokens", "4"])
    found = {row[0]: row[1:] for row in rows(capsys.readouterr().out)}
    for name, (stored, evicted, read, _) in found.items():
        assert (int(evicted) > 0) == ("SnapKV" in name or "RocketKV" in name), name
        prompt = name in ("all", "XAttention", "FlexPrefill", "vertical-slash")
        assert (int(read) == int(stored)) == prompt, name
    load("admissions").main(["--tokens", "300", "--new-tokens", "4"])
    found = {row[0]: row[1:] for row in rows(capsys.readouterr().out)}
    for name, (admitted, stored, _, evicted, late, _) in found.items():
        effect = [admitted != "100%", int(stored) < 303, int(evicted) > 0, int(late) < 303]
        assert all(effect) if name != "all" else not any(effect), name


def test_the_scripts_of_slots_have_every_policy() -> None:
    from kvpolicy import admission, eviction, selection

    spec = spec_of(tiny_llama())
    module = load("evictions")
    made = [
        (eviction.Eviction, {**module.evictions(96), **module.of_files(spec, 128, 96)}),
        (admission.Admission, load("admissions").admissions(spec, 128)),
        (selection.Selection, {n: x.selection for n, x in
                               load("selections").pipelines(96, 64).items()}),
    ]  # fmt: skip
    # What stands in every row, and bases.
    beside = {"KeepAll", "AtPromptEnd", "Eviction", "Admission", "Selection", "PromptSelection"}
    for base, found in made:
        package = sys.modules[base.__module__.rpartition(".")[0]]
        kinds = (x for x in vars(package).values() if isinstance(x, type))
        every = {x.__name__ for x in kinds if issubclass(x, base)}
        assert every - beside <= {type(x).__name__ for x in found.values()}


SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_an_example_shows(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    said = capsys.readouterr().out
    assert left.value.code == 0
    first, command = module.__doc__.splitlines()[0], f"python examples/{name}.py"
    assert first in said and command in said


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


def test_long_document_shares_pages(capsys: pytest.CaptureFixture) -> None:
    load("long_document").main(["--tiny", "--tokens", "600", "--budget", "160"])
    found = {
        row[0]: [int(re.sub("[%,]", "", cell)) for cell in row[1:]]
        for row in rows(capsys.readouterr().out)
    }
    columns, _, _, read, size, shared = range(6)
    steps = ["document", "fork 1", "fork 2", "fork 3", "without forks"]
    assert list(found)[:5] == steps
    assert found["without forks"] == found["document"]  # forks left it as it was
    assert [found[step][columns] for step in steps] == [600, 631, 631, 631, 600]
    assert [found[step][shared] > 0 for step in steps] == [False, True, True, True, False]
    grown = [found[b][size] - found[a][size] for a, b in zip(steps[:3], steps[1:4], strict=True)]
    # A fork adds its ring, its questions and answers, and no document.
    assert all(0 < more < found["document"][size] / 4 for more in grown)
    assert found["turn 3"][columns] == 600 + 3 * (24 + 8) - 1
    assert found["asked aside"] == found["document"]
    assert all(found[f"turn {n}"][read] <= 160 for n in (1, 2, 3))


@pytest.mark.slow
def test_long_document_answers_real_questions(capsys: pytest.CaptureFixture) -> None:
    load("long_document").main([])
    out = capsys.readouterr().out
    said = re.findall(r"\?.*? (\d{4}) \((right|not \d{4})\)", " ".join(out.split()))
    assert [verdict for _, verdict in said] == ["right"] * 7
    shared = {row[0]: int(row[-1].replace(",", "")) for row in rows(out)}
    assert shared["fork 3"] > 1000


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
