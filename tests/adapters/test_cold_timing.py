"""Inductor compares kernels for one token with a cold L2, and those for prompts as it likes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.runtime import benchmarking

from kvpolicy.adapters.hf import compile as compiled
from kvpolicy.adapters.hf.compile import cold_timing

OWN = benchmarking.benchmarker


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes both timers say their names instead of timing; the list holds who was asked."""
    asked: list[str] = []
    for name in ("InductorBenchmarker", "TritonBenchmarker"):
        monkeypatch.setattr(
            getattr(benchmarking, name), "benchmark_gpu",
            lambda self, call, name=name, **options: asked.append(name),
        )  # fmt: skip
    return asked


def tune(*args: Any, **kwargs: Any) -> torch.Tensor:
    """As torch's autotuner asks for a candidate's time."""
    OWN.benchmark(fn=lambda: None, device="cuda", rep=40, is_vetted_benchmarking=True)
    return torch.zeros(0)


def test_triton_times_while_open(timers: list[str]) -> None:
    tune()
    with cold_timing():
        tune()
        with cold_timing():
            tune()
        tune()
    tune()
    assert timers == ["InductorBenchmarker", *["TritonBenchmarker"] * 3, "InductorBenchmarker"]


def test_an_error_closes_it(timers: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), cold_timing():
        raise ZeroDivisionError
    tune()
    assert timers == ["InductorBenchmarker"]


def test_only_single_tokens_are_timed_so(timers: list[str]) -> None:
    for columns in (2, 1):
        compiled._run((tune, tune), [0], [], torch.nn.Identity(), torch.zeros(1, columns, 4))
    assert timers == ["InductorBenchmarker", "TritonBenchmarker"]


def test_a_chosen_benchmarker_stays(timers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Chosen(benchmarking.InductorBenchmarker):
        pass

    monkeypatch.setattr(benchmarking, "benchmarker", Chosen())
    with cold_timing():
        benchmarking.benchmarker.benchmark(fn=lambda: None, device="cuda")
    assert timers == ["InductorBenchmarker"]


def test_without_torchs_internals_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(benchmarking, "benchmarker")
    with cold_timing():
        pass
