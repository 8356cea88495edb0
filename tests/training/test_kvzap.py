"""A line through a text's own tokens ranks them as KVzip does; the command writes such a file."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from kvpolicy import CachePipeline, KVzap, KVzip, Ranked
from kvpolicy.adapters.hf import attach, repeats
from kvpolicy.cli import app
from kvpolicy.evaluation.models import tiny_llama, tiny_tokenizer
from kvpolicy.training import fit_kvzap


@torch.no_grad()
def kept(model, pipeline, ids, passes=()):
    """Positions `[layer][head]` that an eviction leaves."""
    with attach(model, pipeline) as attached:
        cache = attached.new_cache()
        cache.begin_prompt()
        attached.decoder(input_ids=ids[None], past_key_values=cache, use_cache=True)
        for again, span in passes:
            attached.replay(cache, again, span=span)
        cache.end_prompt()
        return [[cache.state.kept(n, 0, h).tolist() for h in range(2)] for n in range(2)]


def test_fewer_tokens_than_channels_are_ranked_as_kvzip_does():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    # No token twice: layer 0 sees tokens alone.
    ids = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:100]
    w2, b2 = fit_kvzap(model, tokenizer, [ids], ridge=1e-9)
    assert w2.shape == (2, 2, 128) and b2.shape == (2, 2)
    kvzip = CachePipeline(eviction=KVzip(budget=40, sinks=0), window=1)
    ranked = CachePipeline(eviction=Ranked(gate=KVzap(w2=w2, b2=b2), budget=40), window=1)
    wanted = kept(model, kvzip, ids, repeats(tokenizer, ids[None]))
    assert kept(model, ranked, ids) == wanted
    assert wanted[0][0] != wanted[0][1] != list(range(60, 100))


def test_a_ridge_holds_weights_back_and_leaves_the_mean():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 256, (n,), generator=generator) for n in (60, 90)]
    free, _ = fit_kvzap(model, tokenizer, texts, ridge=1e-3)
    held, mean = fit_kvzap(model, tokenizer, texts, ridge=1e6)
    assert held.norm() < 1e-3 * free.norm() and (mean < 0).all() and (mean > -16).all()
    with pytest.raises(ValueError, match="texts: wanted one or more"):
        fit_kvzap(model, tokenizer, [])
    with pytest.raises(ValueError, match="ridge: wanted a number of at least 0"):
        fit_kvzap(model, tokenizer, texts, ridge=-1)


@pytest.mark.slow
def test_the_command_writes_a_file_of_the_policy(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "t.txt").write_text("A cache holds keys. It holds values too. " * 60)
    out = tmp_path / "kvzap.safetensors"
    words = ["fit-kvzap", tmp_path / "model", "--texts", tmp_path / "t.txt", "--out", out,
             "--length", 64, "--documents", 2, "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert KVzap.from_pretrained(out).w2.shape == (2, 2, 128)
