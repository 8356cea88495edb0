"""The benchmark on tiny shapes: it checks before it times, isolates failures, and keeps time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

from kvpolicy import BackendError
from kvpolicy._pictures import looks
from kvpolicy.bench import curves, end_to_end, plots, prefill, run, runner, timing
from kvpolicy.bench.context import Bench, Case, check
from kvpolicy.bench.model import Setting
from kvpolicy.bench.model import prefill as prefill_chunks
from kvpolicy.bench.output import print_table
from kvpolicy.bench.prefill import Problem, problem
from kvpolicy.bench.rows import CheckFailed, Goal, Row
from kvpolicy.kernels import paged_decode

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[2]
ONE_OF_EACH = [
    "32K 25%", "prefill: everything", "8K page 16", "write", "snapkv", "ExpectedAttention, 120",
    "gpt-oss sliding",
    "model: gate, 100K",
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
        "ceilings", "prefill", "decode", "write", "snapkv", "evictions", "decoders", "model",
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
    # vLLM is not installed where the suite runs.
    assert {row.group for row in rows} == {"ceilings", *runner.GROUPS} - {"vllm"}


@pytest.mark.slow
def test_a_model_that_two_processes_share(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvpolicy.cli", "bench", "gate, 100K", "--tp", "2", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--seconds", "300"], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = [row["name"] for row in rows if row["group"] == "model"]
    assert {"gate, 100K, TP 2: TTFT", "gate, 100K, TP 2: TPOT"} <= set(names)
    assert not [row["error"] for row in rows if row["error"]]


def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_decode.paged_decode
    monkeypatch.setattr(paged_decode, "paged_decode", lambda *a, **k: right(*a, **k) * 1.02)
    rows = run(["decode: 8K page 16", "prefill: everything"], out=tmp_path, quick=True, seconds=600)
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


def test_a_whole_title_means_one_benchmark() -> None:
    full = Bench(quick=False, seconds=60)
    assert [x.name for x in runner.choose(full, ["model: gate, 100K"])] == ["gate, 100K"]
    part = {x.name for x in runner.choose(full, ["el: gate, 100K"])}
    assert {"gate, 100K", "gate, 100K, 20 % admitted"} <= part
    both = runner.choose(full, ["model: gate, 100K", "decode: 8K"])
    assert {x.name for x in both} == {"gate, 100K", "8K page 64", "8K page 16"}


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


def cost_rows(again: float = 1.0, policy: str = "gate") -> list[Row]:
    """TPOT and memory of two contexts, as a run of `kvpolicy bench model` writes them."""
    found = []
    for n in (2, 1):
        setting = Setting(policy=policy, tokens=100_000 * n)
        about = {"what": "TPOT", "stored": n, **attrs.asdict(setting)}
        shared: dict[str, Any] = {"group": "model", "floor": 7.0 * n}
        found.append(
            Row(name=f"{setting}: TPOT", value=10.0 * n * again, unit="ms", extra=about, **shared)
        )
        found.append(Row(name=f"{setting}: memory", value=3.0 * n, unit="GB", **shared))
    return found


def drawn(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
    }


def pictures(monkeypatch: pytest.MonkeyPatch, draw: Any) -> dict[str, Any]:
    """Figures that `draw` saves, by file name."""
    from matplotlib.figure import Figure

    found: dict[str, Any] = {}
    save = Figure.savefig

    def keep(figure: Figure, path: Path, **options: Any) -> None:
        found[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw()
    return found


def test_curves_join_measurements_over_faint_floors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pictures(monkeypatch, lambda: plots.draw(tmp_path, cost_rows(), "a device"))
    assert set(found) == {path.name for path in tmp_path.glob("*.png")}
    assert set(found) == {
        "model-GB.png", "model-ms.png", "model-memory-and-time.png", "model-over-context.png",
        "model-over-fraction.png", "model-over-stored.png",
    }  # fmt: skip
    figure = found["model-memory-and-time.png"]
    time, memory = figure.axes
    assert [axes.get_ylabel() for axes in (time, memory)] == ["ms", "GB"]
    assert all(axes.get_title() and axes.get_ylim()[0] == 0 for axes in figure.axes)
    assert "a device" in figure.get_suptitle()
    lines = drawn(time)
    assert lines["write gate"] == ([100.0, 200.0], [10.0, 20.0])
    assert drawn(memory)["write gate"] == ([100.0, 200.0], [3.0, 6.0])
    floor, measured = time.lines[:2]
    assert list(floor.get_ydata()) == [7.0, 14.0]
    assert floor.get_alpha() < 0.5 and measured.get_linestyle() == "-"
    (legend,) = figure.legends
    assert [x.get_text() for x in legend.get_texts()][0] == "write gate"
    assert "floor" in legend.get_texts()[-1].get_text()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_a_setting_that_was_measured_again_has_a_bar() -> None:
    rows = [*cost_rows(), *cost_rows(again=1.1)]
    costs = {(c.what, c.setting["tokens"]): c for c in curves.costs(rows)}
    assert costs["TPOT", 100_000].values == (10.0, 11.0)
    assert costs["TPOT", 100_000].value == 11.0
    assert len(costs) == 4


def test_a_method_has_one_look_in_all_pictures() -> None:
    bench = looks(["dense", "gate", "gate + Quest", "gate + SnapKV"])
    evaluation = looks(["full", "write gate", "gate + Quest", "gate + SnapKV at a cap"])
    assert list(bench.values()) == list(evaluation.values())
    known = ["full", "write gate", "DuoAttention", "local", "random", "SnapKV", "Quest",
             "gate + Quest", "gate + SnapKV", "mine", "mine too"]  # fmt: skip
    found = looks(known)
    assert len({look.colour for look in found.values()}) == len(known)
    assert found["SnapKV"] == looks(["SnapKV, question seen at a cap"]).popitem()[1]


def test_rows_of_two_devices_are_no_picture(tmp_path: Path) -> None:
    files = []
    for device in ("a", "b"):
        files.append(tmp_path / f"{device}.json")
        record = {"machine": {"device": device}, "rows": [row.as_dict() for row in cost_rows()]}
        files[-1].write_text(json.dumps(record))
    rows, device = plots.read_rows(files[:1])
    assert (rows, device) == (cost_rows(), "a")
    with pytest.raises(ValueError, match="one device, got a, b"):
        plots.read_rows(files)


def test_the_terminal_shows_whole_cells(capsys: pytest.CaptureFixture) -> None:
    row = Row(group="prefill", name="x" * 41, value=0.1, rate=0.0001234, rate_unit="TFLOP/s")
    print_table([row])
    out = capsys.readouterr().out
    assert "x" * 41 in out and "0.0001234 TFLOP/s" in out


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
    monkeypatch.setattr(sparse_prefill, "choose_rectangles", lambda *_: own)
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
