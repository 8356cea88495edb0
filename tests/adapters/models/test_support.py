"""The table of what is served, and the command that makes it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from kvpolicy.adapters.hf.rule import support
from kvpolicy.adapters.hf.rule.document import document
from kvpolicy.adapters.hf.rule.support import check_type, check_types
from kvpolicy.adapters.hf.rule.tiny import causal_types, multimodal_types, tiny_model
from kvpolicy.cli import app
from tests.support.adapters.versions import NEWEST

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def lines(text):
    return {m[1]: line for line in text.splitlines() if (m := re.match(r"\| `([^`]+)` \|", line))}


def test_a_served_and_a_refused_type():
    found = [check_type("gpt_oss"), check_type("bloom"), check_type("axk2")]
    rows = lines(document(found))
    assert rows["gpt_oss"] == (
        "| `gpt_oss` | 18 sliding, 18 full | 18 of 36 layers | sinks | exact | "
        f"{'yes' if torch.cuda.is_available() else 'not checked'} | yes |"
    )
    assert rows["bloom"].startswith("| `bloom` | handle | it reads .reshape of its cached keys")
    assert re.search(r"\(BloomAttention, modeling_bloom.py:\d+\)", rows["bloom"])
    assert rows["axk2"].startswith("| `axk2` | kinds | layer 0 of AXK2Config is of kind")
    assert "1 of 3 are served" in document(found)


def test_a_type_that_cannot_be_built_gets_no_verdict(monkeypatch):
    def broken(name):
        raise ImportError("no such\npackage")

    monkeypatch.setattr(support, "tiny_model", broken)
    found = check_type("llama")
    assert found.served is None and found.reason == "no tiny model: ImportError: no such package"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), "needs scipy, which is"),
        (
            ImportError("\nA requires the PIL library but.\n\nA requires the timm library but."),
            "needs PIL and timm, which are",
        ),
    ],
)
def test_a_package_that_a_type_needs_is_named(monkeypatch, error, said):
    def broken(name):
        raise error

    monkeypatch.setattr(support, "tiny_model", broken)
    found = check_type("llama")
    assert found.served is None and found.reason == f"{said} not installed"


@NEWEST
@pytest.mark.slow
@pytest.mark.parametrize("name", multimodal_types())
def test_every_multimodal_type_has_a_tiny_model(name):
    try:
        model = tiny_model(name)
    except ImportError as error:
        assert "timm" in str(error)
        return
    assert sum(x.numel() for x in model.parameters()) < 2e8


def call(*arguments):
    return CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)


def test_the_command_lists_types_and_refuses_others():
    assert call().stdout.split() == [*causal_types(), *multimodal_types()]
    wrong = call("llama", "nonsense", "--check")
    assert wrong.exit_code == 2 and "transformers has no language model of nonsense" in wrong.stderr
    assert call("lama").stderr.endswith("no language model of lama; write llama\n")


def test_the_committed_table_is_of_the_installed_version():
    """And has a line for each type, with a verdict or the package that it would need."""
    text = DOCUMENT.read_text(encoding="utf-8")
    version = re.search(r"every causal type of transformers (\S+):", text)[1]
    served = int(re.search(r": (\d+) of \d+ are served", text)[1])
    assert served >= 119
    causal, multimodal = text.split("## Multimodal")
    for part, total in ((causal, served), (multimodal, int(re.search(r"(\d+) of", multimodal)[1]))):
        assert len(lines(part.split("### Refused")[0])) == total
        assert "no tiny model" not in part
    if version == transformers.__version__:
        assert set(causal_types()) == set(lines(causal))
        assert set(multimodal_types()) == set(lines(multimodal))


def crash(name):
    os._exit(7)


@pytest.mark.slow
def test_types_are_checked_in_processes_of_their_own(tmp_path):
    heard = []
    found = check_types(["llama", "falcon"], jobs=2, told=heard.append)
    assert [(x.name, x.served) for x in found] == [("llama", True), ("falcon", False)]
    assert sorted(x.name for x in heard) == ["falcon", "llama"]
    late = check_types(["llama"], seconds=0.01)[0]
    assert late.served is None and late.reason == "no answer within 0.01 s"
    out = tmp_path / "docs" / "models.md"
    assert call("gpt2", "--check", "--out", str(out)).exit_code == 0
    assert "| `gpt2` | 12 full | all layers |" in out.read_text(encoding="utf-8")
