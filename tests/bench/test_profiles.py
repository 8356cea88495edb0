"""Where time goes: kernels told apart, summed by kind, and rows of a tiny run."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.bench import profiles
from kvpolicy.bench.context import Bench
from kvpolicy.bench.family_kernels import kernel_names


def test_kernels_are_told_apart() -> None:
    own = frozenset(kernel_names())
    assert {"_split", "_attend"} <= own
    wanted = {
        "_split": "the cache",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "FlashAttention",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "NCCL",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "products",
        "void cublasLt::splitKreduce_kernel<32, 16>": "products",
        "triton_red_fused_mul_silu_3": "compiled layers",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "void at::native::vectorized_elementwise_kernel<4>": "rest",
    }
    assert {name: profiles.kind_of(name, own) for name in wanted} == wanted


def test_what_a_call_spends() -> None:
    bench, a = Bench(quick=True, seconds=60), torch.randn(64, 64)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        for _ in range(4):
            a @ a

    found = profiles.spent(bench, call, times=4)
    assert len(calls) == 2 and found.wall > 0
    assert list(found.kernels.values()) == sorted(found.kernels.values(), reverse=True)
    assert sum(found.by_kind().values()) == pytest.approx(sum(found.kernels.values()))
    if bench.device.type == "cpu":
        assert found.kernels["aten::mm"] > 0


def test_rows_of_a_prompt_and_of_a_step() -> None:
    bench = Bench(quick=True, seconds=60)
    (case,) = profiles.cases(bench)
    prompt, step = case.run(bench)
    assert [row.name for row in (prompt, step)] == ["gate, 100K: prompt", "gate, 100K: step"]
    for row in (prompt, step):
        assert row.value == pytest.approx(sum(row.extra["kinds"].values()))
        assert 0 < sum(row.extra["kernels"].values()) <= row.value
    assert step.value < prompt.value
    assert ("captured" if torch.cuda.is_available() else "eager") in step.shape


def test_several_devices_have_settings_of_their_own() -> None:
    bench = Bench(quick=False, seconds=60, rank=0, ranks=2)
    assert [x.name for x in profiles.cases(bench)] == [
        "profile of gate, 100K, TP 2", "profile of gate, 400K, TP 2",
    ]  # fmt: skip
