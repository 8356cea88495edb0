"""AdaEA against its formula in float64, and WG-KV's files."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import AdaEA, CachePipeline, Write, load_pipeline, save_pipeline
from kvpolicy._files import write_pt
from kvpolicy.testing import check_admission

LAYERS, KV, GROUP, DIM = 2, 3, 2, 16


def statistics(seed=0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(LAYERS, KV, GROUP, DIM, DIM, generator=rng)
    mean = torch.randn(LAYERS, KV, GROUP, DIM, generator=rng)
    return {"mean": mean, "covariance": q @ q.mT / DIM}


def policy(**options):
    limits = torch.linspace(0.5, 1.6, LAYERS * KV * GROUP).view(LAYERS, KV, GROUP)
    return AdaEA(**statistics(), thresholds=limits, **options)


def write(tokens=40, start=0, layer=1):
    rng = torch.Generator().manual_seed(tokens)
    key = torch.randn(KV, tokens, DIM, generator=rng)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    return Write(key, key, torch.arange(start, start + tokens), cu, layer, range(KV))


@pytest.mark.parametrize("start", [0, 100])
def test_a_token_is_admitted_by_the_formula(start):
    gate, given = policy(), write(start=start)
    admitted = gate.admit(given)
    parts = statistics()
    for h in range(KV):
        for t, k in enumerate(given.key[h].double()):
            logits = [
                float(k @ parts["mean"][1, h, g].double()) / DIM**0.5
                + float(k @ parts["covariance"][1, h, g].double() @ k) / (2 * DIM)
                for g in range(GROUP)
            ]
            limits = gate.thresholds[1, h].tolist()
            wanted = any(a > b for a, b in zip(logits, limits, strict=True))
            assert bool(admitted[h, t]) == (wanted or start + t < 4)
    assert 0.1 < admitted.float().mean() < 0.9


def test_generated_tokens_are_decided_as_others():
    """WG-KV's code takes each for the first of a prompt, and admits it."""
    later = write(tokens=1, start=50)
    low = attrs.evolve(policy(), thresholds=torch.full((LAYERS, KV, GROUP), 1e9))
    assert not low.admit(later).any() and low.admit(write(tokens=1)).all()


def test_it_conforms():
    check_admission(policy(), kv_heads=KV, head_dim=DIM)
    check_admission(policy(), kv_heads=KV, head_dim=DIM, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path):
    """Statistics and tables as gather.py writes them."""
    gate = policy()
    stats = {
        "mean_query": list(gate.mean.flatten(1, 2)),
        "cov_query": list(gate.covariance.flatten(1, 2)),
    }
    write_pt(tmp_path / "query_stats.pt", stats)
    for name, table in (("threshold", gate.thresholds.flatten(1)), ("retain_ratio", None)):
        table = torch.full((LAYERS, KV), 0.25) if table is None else table
        rows = ["\t".join(f"{x:10.4f}" for x in row) + "\n" for row in table.tolist()]
        (tmp_path / f"0.75_{name}.tsv").write_text("".join(rows))
    return tmp_path


def test_wg_kvs_files(folder):
    gate = AdaEA.from_pretrained(folder, sparsity=0.75, window=64)
    assert torch.equal(gate.mean, policy().mean) and gate.window == 64
    assert torch.allclose(gate.thresholds, policy().thresholds, atol=1e-4)
    gate.save(folder / "gate.safetensors")
    again = AdaEA.from_pretrained(folder / "gate.safetensors", window=64)
    assert torch.equal(again.admit(write()), gate.admit(write()))
    save_pipeline(CachePipeline(admission=again), folder / "pipeline.json")
    loaded = load_pipeline(folder / "pipeline.json").admission
    assert torch.equal(loaded.covariance, gate.covariance) and loaded.window == 64


def test_files_that_do_not_fit_are_named(folder):
    (folder / "0.5_threshold.tsv").write_text("1\t2\n3\t4\n")
    (folder / "0.5_retain_ratio.tsv").write_text("1\t2\n3\t4\n")
    with pytest.raises(ValueError, match=r"query_stats\.pt: wanted statistics of .*\[2, 2\]"):
        AdaEA.from_pretrained(folder, sparsity=0.5)
    (folder / "0.5_threshold.tsv").write_text("1\tx\n")
    with pytest.raises(ValueError, match=r"0\.5_threshold\.tsv: wanted a row of numbers"):
        AdaEA.from_pretrained(folder, sparsity=0.5)
    with pytest.raises(ValueError, match=r"mean: wanted \[L, Hkv, D\] = \[2, 4, 16\]"):
        policy().check(2, 4, 16)
