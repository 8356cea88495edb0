"""The benchmark on tiny shapes: it checks before it times, isolates failures, and keeps time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpolicy import BackendError
from kvpolicy.bench import end_to_end, plots, prefill, run, runner, timing
from kvpolicy.bench.context import Bench, Case, check
from kvpolicy.bench.model import SHAPES, Setting
from kvpolicy.bench.model import prefill as prefill_chunks
from kvpolicy.bench.prefill import Problem, problem
from kvpolicy.bench.rows import CheckFailed, Goal, Row
from kvpolicy.kernels import paged_decode

CUDA = torch.cuda.is_available()
ONE_OF_EACH = [
    "32K 25%", "everything admitted", "8K page 16", "write", "snapkv", "gpt-oss sliding",
    "gate, 100K",
]  # fmt: skip


@pytest.fixture
def bench() -> Bench:
    found = Bench(quick=True, seconds=60)
    found.copy_rate = found.flop_rate = 1e9
    return found


def test_quick_run_writes_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = run(ONE_OF_EACH, out=tmp_path, quick=True, seconds=600)
    assert not [row.error for row in rows if row.error]
    assert {row.group for row in rows} == {
        "ceilings", "prefill", "decode", "write", "snapkv", "decoders", "model",
    }  # fmt: skip
    assert all(row.value and row.value > 0 for row in rows if row.group != "ceilings")
    timed = [row for row in rows if row.unit in ("ms", "us", "s") and "gather" not in row.name]
    assert all(row.floor and row.floor > 0 for row in timed)
    (prompt,) = (row for row in rows if row.name == "gate, 100K: TTFT")
    assert prompt.note.startswith("chunks of 32 tokens")  # 96 tokens, up to 40 a chunk
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == [row.name for row in rows]
    assert found["machine"]["quick"] is True
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert len(lines) == len(rows) + 4
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert {path.name for path in tmp_path.glob("*.png")} >= {
        "prefill-ms.png", "decode-us.png", "model-over-context.png", "model-over-stored.png",
    }  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("goals:")
    assert printed[-len(rows) - 2].startswith("group")


@pytest.mark.slow
def test_every_benchmark_runs_quickly(tmp_path: Path) -> None:
    rows = run(out=tmp_path, quick=True, seconds=1200)
    assert not [(row.name, row.error) for row in rows if row.error]
    assert {row.group for row in rows} == {"ceilings", *runner.GROUPS}


def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_decode.paged_decode
    monkeypatch.setattr(paged_decode, "paged_decode", lambda *a, **k: right(*a, **k) * 1.02)
    rows = run(["decode: 8K page 16", "everything"], out=tmp_path, quick=True, seconds=600)
    wrong = [row for row in rows if row.group == "decode"]
    assert [row.value for row in wrong] == [None]
    assert "relative error" in wrong[0].error
    assert [row.error for row in rows if row.group == "prefill"] == [""]


def test_a_failure_keeps_finished_rows(bench: Bench) -> None:
    def breaks(bench: Bench):
        yield Row(group="decode", name="first", value=1.0)
        raise RuntimeError("no room\nfor this")

    rows = runner.attempt(bench, Case(group="decode", name="both", run=breaks))
    assert [(row.name, row.value, row.error) for row in rows] == [
        ("first", 1.0, ""),
        ("both", None, "RuntimeError: no room"),
    ]


def test_nothing_starts_after_the_limit(tmp_path: Path) -> None:
    rows = run(["model", "launches"], out=tmp_path, quick=True, seconds=0.0)
    rest = [row for row in rows if row.group != "ceilings"]
    assert rest and all("not started" in row.error for row in rest)


def test_important_benchmarks_come_first(bench: Bench) -> None:
    names = [f"{case.group}: {case.name}" for case in runner.choose(bench, [])]
    assert names[:3] == ["prefill: 131K 25%", "decode: 100K page 64", "decode: 100K page 16"]
    assert names[3].startswith("model: gate, 100K")


def test_every_target_has_a_setting() -> None:
    planned = {end_to_end.FIRST, *end_to_end.PLAN}
    assert len(planned) == len(end_to_end.PLAN) + 1
    for table in (end_to_end.TTFT, end_to_end.TPOT):
        for shape, goals in table.items():
            assert {end_to_end.GATE(tokens=n, shape=shape) for n in goals} <= planned
    assert {end_to_end.GATE(tokens=32_000, batch=n) for n in end_to_end.BATCHED} <= planned


@pytest.mark.parametrize(
    "setting, prompt",
    [
        (end_to_end.GATE(tokens=100_000), 4.43),
        (end_to_end.DENSE(tokens=100_000), 7.15),
        (end_to_end.GATE(tokens=400_000), 33.9),
    ],
)
def test_estimates_cover_what_was_measured(setting: Setting, prompt: float) -> None:
    """Prompt and 350 steps in seconds, measured with uncompiled layers; not twice as much."""
    assert prompt + 4 < end_to_end.seconds(setting) < 2 * prompt + 20


def test_curves_hold_points_and_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    lines: list[tuple[str, list[float], list[float]]] = []
    monkeypatch.setattr(plt, "close", lambda figure: lines.extend(
        (axis.get_ylabel(), list(line.get_xdata()), list(line.get_ydata()))
        for axis in figure.axes for line in axis.lines
    ))  # fmt: skip
    rows = [
        Row(
            group="model", name="", value=10.0 * n, unit="ms", floor=7.0 * n,
            extra={"what": "TPOT", "shape": SHAPES[0], "policy": "gate", "tokens": 100_000 * n,
                   "batch": 1, "fraction": 0.25, "stored": n},
        )
        for n in (2, 1)
    ]  # fmt: skip
    plots.draw(tmp_path, rows)
    assert ("TPOT [ms]", [100.0, 200.0], [10.0, 20.0]) in lines
    assert ("TPOT [ms]", [100.0, 200.0], [7.0, 14.0]) in lines
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        f"model-{x}.png" for x in ("ms", "over-context", "over-fraction", "over-stored")
    }


def test_unknown_names_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="got 'nothing'"):
        runner.choose(bench, ["decode", "nothing"])


@pytest.mark.skipif(CUDA, reason="needs a machine without a GPU")
def test_full_shapes_want_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="quick"):
        run(out=tmp_path)


@pytest.mark.parametrize("start", [0, 40, 75])
def test_visible_pairs_are_counted(bench: Bench, start: int) -> None:
    p: Problem = problem(bench, 80, [0.4, 0.0], 16, start)
    i, j = torch.arange(start, 80)[:, None], torch.arange(80)
    seen = (j <= i) & ((i - j < p.window) | p.admitted.cpu()[:, None])
    group = p.query.shape[0] // 2
    assert p.pairs() == group * int(seen.sum())


@pytest.mark.parametrize("broken", ["nan", "shift"])
def test_check_refuses(bench: Bench, broken: str) -> None:
    p = problem(bench, 70, [0.5, 0.5], 16)
    wide = [x.repeat_interleave(2, 0).double() for x in (p.key, p.value, p.admitted)]
    j = torch.arange(70, device=bench.device)
    i = j[:, None]
    seen = (j <= i) & ((i - j < p.window) | wide[2][:, None].bool())
    scores = (p.query.double() @ wide[0].mT * p.scale).masked_fill(~seen, float("-inf"))
    out = (scores.softmax(-1) @ wide[1]).to(p.query.dtype)
    p.check("right", out)
    if broken == "shift":
        out = out.roll(1, 2)
    else:
        out[:, 33] = torch.nan
    with pytest.raises(CheckFailed, match="not timed"):
        p.check("wrong", out)


def test_prompts_come_in_equal_chunks() -> None:
    seen: list[int] = []

    def model(input_ids: torch.Tensor, **_: Any) -> Any:
        seen.append(input_ids.shape[1])
        return SimpleNamespace(logits=torch.eye(3)[[2, 1]][:, None])

    ended: list[int] = []
    cache = SimpleNamespace(end_prompt=lambda: ended.append(len(seen)))
    token = prefill_chunks(model, cache, torch.zeros(2, 25, dtype=torch.long), 16)
    assert seen == [7, 6, 6, 6] and ended == [4] and token.tolist() == [2, 1]


def test_goals() -> None:
    found = [Goal(what="", wanted=10, got=got).verdict for got in (10, 10.5, 12)]
    assert found == ["met", "short", "missed"]
    found = [Goal(what="", wanted=10, got=got, at_most=False).verdict for got in (10, 9.5, 8)]
    assert found == ["met", "short", "missed"]
    assert [Goal(what="", wanted=0, got=got).verdict for got in (0, 1)] == ["met", "missed"]


def test_buffer_sets_exceed_the_cache() -> None:
    assert timing.sets_for(1 << 20) * (1 << 20) >= 256 << 20
    assert timing.sets_for(1 << 30) == 1


def test_relative_error_is_of_the_norm() -> None:
    exact = torch.ones(100)
    check("fine", exact + 0.009, exact)
    with pytest.raises(CheckFailed):
        check("off", exact + 0.011, exact)


def test_both_ways_of_a_prompt_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpolicy.kernels import sparse_prefill
    from kvpolicy.kernels.prefill_gather import Rectangles

    def dense(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(q))
        return q, q[..., 0].T.float()

    calls: list[int] = []
    own = Rectangles(dense, least=1000, average=0, work=0)
    monkeypatch.setattr(sparse_prefill, "choose_rectangles", lambda query: own)
    monkeypatch.setattr(prefill, "median_ms", lambda calls, device: 1.0)
    rows = list(prefill.sparse(bench, "own", 48, [0.3, 0.3], 16, 540))
    assert [row.name for row in rows] == ["own", "own: gather", "own: Triton alone"]
    goals = {goal.what for goal in rows[0].goals}  # with a GPU also those beside other kernels
    assert calls and "TFLOP/s" in goals and not (rows[1].goals or rows[2].goals)
    calls.clear()
    own = own._replace(work=1 << 30)
    rows = list(prefill.last_chunk(bench, "chunk"))
    assert [row.name for row in rows] == ["chunk", "chunk: FA3 rectangles"]
    assert calls and [len(row.goals) for row in rows] == [1, 0]
