"""Memory on a GPU is what the report claims, and falls when tokens are evicted."""

from __future__ import annotations

import gc

import pytest
import torch

from kvpolicy import AdmitAll, CachePipeline, CacheSpec, LocalAttention, RandomGate, SnapKV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "admission", [AdmitAll(), LocalAttention(window=256), RandomGate(sparsity=0.75)]
)
def test_memory_allocated_is_what_the_report_claims(admission) -> None:
    spec = CacheSpec(
        layers=4, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    pipeline = CachePipeline(admission=admission)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    state = pipeline.init(spec, 1)
    for _ in range(4):
        pipeline.begin(state, [8192], "prompt")
        for layer in range(4):
            q = torch.randn(32, 8192, 128, dtype=torch.bfloat16, device="cuda")
            k, v = (
                torch.randn(8, 8192, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)
            )
            pipeline.attend(state, layer, q, k, v)
        pipeline.commit(state)
    del q, k, v
    report = pipeline.report(state)
    allocated = torch.cuda.memory_allocated() - before
    assert abs(allocated - report.total) <= 0.02 * report.total + (1 << 20), (
        allocated,
        report,
    )
    assert report.reserved <= max(0.1 * report.kv, 2 << 20)


def test_eviction_frees_device_memory() -> None:
    spec = CacheSpec(
        layers=4, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    pipeline = CachePipeline(eviction=SnapKV(budget=2048))
    state = pipeline.init(spec, 1)
    pipeline.begin(state, [16384], "prompt")
    for layer in range(4):
        q = torch.randn(32, 16384, 128, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.randn(8, 16384, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        pipeline.attend(state, layer, q, k, v)
    pipeline.commit(state)
    del q, k, v
    gc.collect()
    before, claimed = torch.cuda.memory_allocated(), pipeline.report(state).total
    pipeline.end_prompt(state)
    fell = before - torch.cuda.memory_allocated()
    told = claimed - pipeline.report(state).total
    assert told > 0.8 * claimed and abs(fell - told) <= 0.02 * claimed, (fell, told)
