"""The README's code runs as it stands, with tiny things in place of downloads."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from kvpolicy import WriteGate
from kvpolicy.evaluation.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, return_tensors: str) -> transformers.BatchEncoding:
        ids = torch.tensor([[2 + ord(c) % 500 for c in text]])
        return transformers.BatchEncoding(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        )

    def decode(self, ids: torch.Tensor) -> str:
        return f"{len(ids)} tokens"


def tiny_gate(path: Path) -> Path:
    torch.manual_seed(0)
    gate = WriteGate(
        norm_pre=torch.ones(2, 32),
        norm_post=torch.ones(2, 32),
        w1=torch.randn(2, 2, 16, 64) / 4,
        b1=torch.zeros(2, 2, 16),
        w2=torch.randn(2, 2, 16),
        b2=torch.full((2, 2), -2.0),
    )
    gate.save(path)
    return path


def test_first_code_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    gate, asked = tiny_gate(tmp_path / "gate.pt"), []

    def download(repo: str, file: str, revision: str | None = None) -> str:
        asked.append((repo, file))
        return str(gate)

    model = tiny_llama()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaders = {"AutoModelForCausalLM": model, "AutoTokenizer": Letters()}
    for name, thing in loaders.items():
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *a, _thing=thing, **k: _thing
        )
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was a dark and stormy night. " * 20)
    before = dict(model.__dict__), model.config._attn_implementation
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert asked == [("WG-KV/checkpoints", "llama-3.1-8b-instruct-0.16.pt")]
    out = capsys.readouterr().out
    assert out.startswith("200 tokens\n")
    assert 0.1 < names["report"].mean_admitted < 0.9
    assert (dict(model.__dict__), model.config._attn_implementation) == before
    assert len(code.splitlines()) <= 20


def test_links_and_examples_exist() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in re.findall(r"`(\w+\.py)` \|", TEXT):
        assert (ROOT / "examples" / name).is_file(), name


def test_errors_in_the_table_are_the_codes() -> None:
    sources = [p for d in ("kvpolicy", "adapters") for p in (ROOT / d).rglob("*.py")]
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text(encoding="utf-8")) for p in sources)
    for phrase in (
        "the adapters serve",
        "the model has {name}=",
        "wanted at least window + 1 = ",
        "the parts of the pipeline disagree",
        "wanted a 2D mask of real tokens",
        "an attached model serves inference only; detach it to train",
        "the attached model is running in another thread",
        "kernels need a CUDA device",
    ):
        assert phrase in code, phrase
