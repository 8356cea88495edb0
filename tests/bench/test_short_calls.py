"""Short prompts and first calls: what is timed, beside what, and which goals they have."""

from __future__ import annotations

import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from kvpolicy import BackendError
from kvpolicy.bench import first_call, prompts
from kvpolicy.bench.context import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench(quick=True, seconds=60)


def test_every_length_in_every_way(bench: Bench) -> None:
    (case,) = prompts.cases(bench)
    rows = list(case.run(bench))
    assert [row.name for row in rows] == [
        f"{way}, {length} tokens" for way in prompts.WAYS for length in (24, 40)
    ]
    assert all(row.value and row.value > 0 for row in rows)
    plain = {row.name.split(", ")[-1]: row.value for row in rows[:2]}
    for row in rows[2:]:
        beside = plain[row.name.split(", ")[-1]]
        assert row.baseline.startswith(f"{beside / row.value:.2f}x plain")


def test_goals_of_short_prompts(bench: Bench) -> None:
    counts = Counter(kernels=70, copies=20)  # of two layers
    row = prompts._row(bench, "gate", 2000, 90.0, 100.0, counts)
    assert [(x.what, x.wanted, x.got, x.verdict) for x in row.goals] == [
        ("of plain", 0.85, 0.9, "short"), ("launches a layer", 45, 45.0, "met"),
    ]  # fmt: skip
    assert not prompts._row(bench, prompts.PLAIN, 2000, 90.0, 90.0, counts).goals


def test_a_process_reads_what_the_one_before_wrote(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def child(layers: str, folder: str, quick: bool, patience: float) -> dict[str, float]:
        asked.append((layers, folder))
        return {"first call": 2.0, "second call": 0.5, "a new batch size": 4.0}

    monkeypatch.setattr(first_call, "child", child)
    bench.quick = False
    rows = {row.name: row for row in first_call.rows(bench)}
    assert asked[0] == asked[1] and asked[2] == asked[3] and asked[0] != asked[2]
    assert len(rows) == 12
    goals = {name: row.goals[0] for name, row in rows.items() if row.goals}
    assert goals["first call, eager layers, from disk"].verdict == "met"
    assert goals["a new batch size, compiled layers, from disk"].verdict == "missed"
    both = goals["a new batch size, eager layers, nothing on disk"]
    assert (both.wanted, both.got) == (40.0, 6.0)


def test_calls_of_a_process(bench: Bench) -> None:
    found = first_call.calls(bench, compiled=False)
    assert set(found) == {"first call", "second call", "a new batch size"}
    assert all(seconds > 0 for seconds in found.values())


def test_what_a_process_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def run(asked: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        seen.append(env)
        said = 'noise\nfirst call: {"first call": 1.5}\n' if asked[-1] == "whole" else ""
        return SimpleNamespace(stdout=said, stderr="no\nroom", returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    assert first_call.child("eager layers", "f", False, 9) == {"first call": 1.5}
    assert {"f/triton", "f/inductor"} <= set(seen[0].values())
    with pytest.raises(BackendError, match="exit code 3: room"):
        first_call.child("eager layers", "f", True, 9)


def test_a_batch_has_rows_of_several_lengths(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def generate(*_: object, attention_mask: torch.Tensor, **__: object) -> torch.Tensor:
        seen.append(attention_mask.sum(1))
        return attention_mask

    model = first_call.build(bench, first_call.SHAPES[0])
    monkeypatch.setattr(model, "generate", generate)
    first_call.calls(bench, compiled=False)
    assert [x.tolist() for x in seen] == [[20], [20], [20, 9]]
