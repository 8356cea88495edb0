"""Filters are directions of queries: against numpy's singular vectors, and as a policy's file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from kvpolicy import QFilters
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from kvpolicy.cli import app
from kvpolicy.evaluation.grid.methods import method_variants
from kvpolicy.evaluation.grid.variants import Room
from kvpolicy.evaluation.methods.files import Given
from kvpolicy.evaluation.models import tiny_llama, tiny_tokenizer
from kvpolicy.training import fit_q_filters


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=generator) for n in (40, 70)]


def queries(model, texts, monkeypatch):
    """Queries `[layer][H, N, D]` after RoPE of all texts, as transformers makes them."""
    found: list[list[torch.Tensor]] = []
    plain = modeling_llama.apply_rotary_pos_emb

    def turned(q, k, *rest, **more):
        out = plain(q, k, *rest, **more)
        found[-1].append(out[0][0])
        return out

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    for ids in texts:
        found.append([])
        with torch.no_grad():
            model(ids[None])
    monkeypatch.undo()
    return [torch.cat(layer, 1) for layer in zip(*found, strict=True)]


def test_filters_are_the_first_singular_vectors_of_the_queries(texts, monkeypatch):
    model = tiny_llama()
    seen = queries(model, texts, monkeypatch)
    found = fit_q_filters(model, texts)
    assert found.shape == (2, 2, 32) and found.dtype == torch.float32
    for layer, every in enumerate(seen):
        for head in range(2):
            wanted = []
            for query in every[2 * head : 2 * head + 2].double().numpy():
                first = np.linalg.svd(query, full_matrices=False)[2][0]
                wanted.append(first if query.mean(0) @ first > 0 else -first)
            filters = -np.mean(wanted, 0)
            np.testing.assert_allclose(found[layer, head].numpy(), filters, atol=1e-4)


def test_what_cannot_be_fitted_is_refused(texts):
    with pytest.raises(ValueError, match="texts: wanted one or more"):
        fit_q_filters(tiny_llama(), [])
    with pytest.raises(ValueError, match="one that slides"):
        fit_q_filters(tiny_model("gemma2").eval(), texts)


def test_the_commands_file_is_one_of_the_methods(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "t.txt").write_text("A cache holds keys. It holds values too. " * 60)
    out = tmp_path / "filters.safetensors"
    words = ["fit-q-filters", tmp_path / "model", "--texts", tmp_path / "t.txt", "--out", out,
             "--length", 64, "--documents", 2, "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = QFilters.from_pretrained(out, budget=64)
    assert found.filters.shape == (2, 2, 32)
    given = Given(files={"Q-Filters": out})
    (variant,) = [x for x in method_variants([0.4], 32, given) if x.name == "Q-Filters 0.4"]
    eviction = variant.build(Room(256, 660, 20, page=8)).eviction
    assert isinstance(eviction, QFilters) and torch.equal(eviction.filters, found.filters)
