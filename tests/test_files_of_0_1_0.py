"""Files that version 0.1.0's own code wrote, tests/data/v010, go on as they would have there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from kvpolicy import AtPromptEnd, CachePipeline, DuoAttention, LocalAttention, SnapKV, WriteGate
from kvpolicy.adapters.hf import attach, load_cache
from kvpolicy.evaluation.grid.results import FORMAT, Store
from kvpolicy.store.fingerprint import pipeline_fingerprint
from kvpolicy.training import TrainingMix, WriteGates, train_duo_attention, train_write_gate
from tests.support.files_of_0_1_0 import FILES, FINGERPRINTS, SIZES, caches, model
from tests.support.training.small import TEXT, make_tokenizer

EXPECTED = json.loads((FILES / "expected.json").read_text())


@pytest.fixture
def config(monkeypatch):
    """The config that files were bound to: the real one has other fields in each transformers."""
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {"model_type": "llama"})


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FILES, tmp_path / "files")


def mix(**options):
    return TrainingMix(texts=[TEXT], tokenizer=make_tokenizer(), **{"length": 96, **options})


def trained_model():
    return model(layers=1, hidden=8, heads=2, kv_heads=1)


@pytest.mark.parametrize("name", ["gate-quest-snapkv", "at-prompt-end"])
def test_caches_go_on(name, config):
    """Two more turns of two padded sequences: tokens, and what is stored and evicted."""
    llama, pipeline, wanted = model(), caches()[name], EXPECTED[name]
    ids, tokens = torch.tensor(wanted["first"]), []
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    more = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(2))
    with attach(llama, pipeline, **SIZES):
        cache = load_cache(llama, pipeline, FILES / f"{name}.safetensors", **SIZES)
        assert (cache.phase, cache.columns) == ("decode", 35)
        for turn in range(2):
            ids = torch.cat([ids, more + turn], 1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            ids = llama.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False
            )
            tokens.append(ids[:, -12:].tolist())
    report = cache.report()
    assert tokens == wanted["tokens"]
    assert (report.stored, report.evicted) == (wanted["stored"], wanted["evicted"])
    assert any(map(any, report.evicted))


def test_a_cache_of_a_default_that_changed_is_refused(config):
    """Written as it was for version 0.1.0, the pipeline means something else today."""
    pipeline = CachePipeline(eviction=AtPromptEnd(LocalAttention(window=6, sinks=2)))
    with pytest.raises(ValueError, match=r"version 0\.1\.0's defaults .*window=256.*\"keep\""):
        load_cache(model(), pipeline, FILES / "at-prompt-end.safetensors", **SIZES)
    snapkv = CachePipeline(eviction=SnapKV(budget=1024))
    assert pipeline_fingerprint(snapkv)[:16] not in dict(FINGERPRINTS)


@pytest.mark.parametrize(("wanted", "pipeline"), FINGERPRINTS)
def test_pipelines_are_known_again(wanted, pipeline):
    assert pipeline_fingerprint(pipeline)[:16] == wanted


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_gates_load(suffix):
    """The file of plain tensors holds no settings; the other one does."""
    path = FILES / f"gate.{suffix}"
    gate = WriteGate.from_pretrained(path)
    values = load_file(FILES / "gate.safetensors")
    key = "model.layers.0.self_attn.g_predictors.conv1.weight"
    assert torch.equal(gate.w1.flatten(), values[key].flatten())
    assert (gate.window, gate.threshold) == (8 if suffix == "safetensors" else 256, 0.1)
    loaded = WriteGates.load(path, trained_model()).state_dict()
    assert torch.equal(loaded["layers.0.conv1.weight"], values[key])


def test_patterns_load():
    pattern = DuoAttention.from_pretrained(FILES / "duo", sparsity=0.5)
    assert (pattern.full_heads, pattern.sinks, pattern.window) == (((True,),), 2, 8)


def test_trainings_of_gates_go_on(folder):
    """Stopped after two of four steps; the rest gives the gates of an unbroken run."""
    seen = []
    trained = train_write_gate(
        trained_model(), mix(), steps=4, window=8, batch_size=1, target_keep=0.4, expand=1.0,
        lr=1e-2, ungated=3, out_dir=folder / "gate-run", progress=seen.append,
    )  # fmt: skip
    assert [metrics["step"] for metrics in seen] == [3, 4]
    wanted = WriteGates.load(FILES / "gate.safetensors", trained_model()).state_dict()
    torch.testing.assert_close(trained.gates.state_dict(), wanted, atol=1e-5, rtol=1e-4)
    assert {"keep": trained.keep, "lam": trained.lam} == pytest.approx(EXPECTED["gate"], rel=1e-4)


def test_trainings_of_patterns_go_on(folder):
    seen = []
    trained = train_duo_attention(
        trained_model(), mix(length=400, kinds={"facts": 1.0}), steps=4, sink_size=2,
        recent_size=8, lam=10.0, out_dir=folder / "duo-run", progress=seen.append,
    )  # fmt: skip
    assert [metrics["step"] for metrics in seen] == [3, 4]
    torch.testing.assert_close(trained.heads, torch.tensor(EXPECTED["duo"]), atol=1e-5, rtol=1e-4)


def test_a_training_with_other_settings_is_refused(folder):
    with pytest.raises(ValueError, match=r"run of another target_keep: 0\.4"):
        train_write_gate(
            trained_model(), mix(), steps=4, window=8, batch_size=1, target_keep=0.5, expand=1.0,
            lr=1e-2, ungated=3, out_dir=folder / "gate-run",
        )  # fmt: skip


def test_results_go_on(folder):
    """Two cells that were measured, and one that 0.1.0 called skipped although it failed."""
    store = Store(folder / "results")
    with pytest.raises(ValueError, match="results of another seed: 0"):
        store.open({"model": "tiny", "seed": 1}, {"device": "cpu"})
    full, local, failed = store.open({"model": "tiny", "seed": 0}, {"device": "cpu"})
    assert [x.key for x in (full, local)] == [("loss", 128, "full"), ("loss", 128, "local 50%")]
    assert [x.measured.footprint.held_tokens for x in (full, local)] == [127, 52]
    assert [x.measured.scores["loss"][0] for x in (full, local)] == pytest.approx(
        [7.1344, 7.0118], 1e-4
    )
    assert failed.failed == "tokenizer: it has no chat template" and failed.measured is None
    assert store.record()["format"] == FORMAT
    assert store.record()["made_with"] == [{"device": "cpu"}]
    again = Store(folder / "results").open({"model": "tiny", "seed": 0}, {"device": "cpu"})
    assert again == [full, local, failed]
