"""Statistics are of queries before RoPE: against the projections, and as a policy's file."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from kvpolicy import TriAttention
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from kvpolicy.cli import app
from kvpolicy.evaluation.models import tiny_llama, tiny_tokenizer
from kvpolicy.training import fit_triattention


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=generator) for n in (40, 70)]


@torch.no_grad()
def test_statistics_are_those_of_the_projected_queries(texts):
    model = tiny_llama()
    seen = [[], []]
    for layer, into in zip(model.model.layers, seen, strict=True):
        layer.self_attn.q_proj.register_forward_hook(lambda m, i, o, into=into: into.append(o[0]))
    found = fit_triattention(model, texts)
    real, imaginary, size = found
    assert real.shape == imaginary.shape == size.shape == (2, 4, 16)
    for layer, made in enumerate(seen):
        queries = torch.cat(made[-2:]).view(110, 4, 32)  # [N, Hq, D], after probes of the model
        first, second = queries[..., :16], queries[..., 16:]
        torch.testing.assert_close(real[layer], first.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(imaginary[layer], second.mean(0), atol=1e-5, rtol=1e-4)
        wanted = torch.hypot(first, second).mean(0)
        torch.testing.assert_close(size[layer], wanted, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_fitted_is_refused(texts):
    with pytest.raises(ValueError, match="texts: wanted one or more"):
        fit_triattention(tiny_llama(), [])
    with pytest.raises(ValueError, match="one that slides"):
        fit_triattention(tiny_model("gemma2").eval(), texts)


def test_the_command_writes_a_file_of_the_policy(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "t.txt").write_text("A cache holds keys. It holds values too. " * 60)
    out = tmp_path / "statistics.safetensors"
    words = ["fit-triattention", tmp_path / "model", "--texts", tmp_path / "t.txt", "--out", out,
             "--length", 64, "--documents", 2, "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = TriAttention.from_pretrained(out, budget=64)
    assert found.size.shape == (2, 4, 16)
