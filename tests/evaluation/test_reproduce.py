"""Figures of WG-KV on a tiny model: ours beside the published, and runs that go on."""

from __future__ import annotations

import json
import math

import pytest

from tests.support.evaluation.small import small_gate

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from kvpolicy.cli import app  # noqa: E402
from kvpolicy.cli.reproduce import UNMEASURED  # noqa: E402
from kvpolicy.evaluation.chart import Chart, Point  # noqa: E402
from kvpolicy.evaluation.finished import Finished  # noqa: E402
from kvpolicy.evaluation.reproduce import published, setup  # noqa: E402


def call(*words, code=0):
    told = ["reproduce", "wg-kv", *words, "--device", "cpu"]
    done = CliRunner().invoke(app, list(map(str, told)), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def ours(path):
    return [x for x in json.loads(path.read_text())["points"] if x["by"] != published.BY]


def test_a_quality_figure_stands_beside_the_papers_and_a_run_goes_on(tmp_path):
    out = tmp_path / "out"
    done = call("fig10", "--quick", "--out", out)
    assert UNMEASURED in done.output and UNMEASURED in (out / "fig10/fig10.md").read_text()
    found = {x["name"]: x for x in ours(out / "fig10/fig10.json")}
    assert list(found) == ["full", "SnapKV 48", "lambda 0.32", "lambda 0.32 + SnapKV"]
    cells = [json.loads(x) for x in (out / "fig10/cells/cells.jsonl").read_text().splitlines()]
    full, capped, gated, both = (found[name]["x"] for name in found)
    # A head holds what it saw: prompt, question and answers of up to 64 tokens.
    assert full > 64 and cells[0]["seen_tokens"] < 40
    assert capped <= 48 + 16 < full  # evictions act every 16 tokens
    assert both <= gated < full
    table = (out / "fig10/fig10.md").read_text()
    assert "| gate + SnapKV | lambda 0.32 | 3289 | 0.8 | WG-KV, published |" in table
    assert (out / "fig10/fig10.png").exists()
    again = call("fig10", "--quick", "--out", out)
    assert "score" not in again.output  # every cell was there
    assert {x["name"]: x["x"] for x in ours(out / "fig10/fig10.json")} == {
        name: x["x"] for name, x in found.items()
    }


def test_time_and_bytes_by_length(tmp_path):
    call("fig8", "--quick", "--out", tmp_path)
    for number in (1, 2, 3):
        found = ours(tmp_path / f"fig8/fig8-{number}.json")
        assert {(x["curve"], x["x"]) for x in found} == {
            (curve, x) for curve in ("full", "write gate") for x in setup.TINY.lengths
        }
        assert all(x["y"] > 0 for x in found)
        held = {x["curve"]: x["more"]["held"] for x in found}
        assert held["full"] == 1 and held["write gate"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["fig7", "fig9"])
def test_helmets_figures(tmp_path, figure):
    call(figure, "--quick", "--out", tmp_path)
    found = ours(tmp_path / figure / f"{figure}.json")
    assert {x["more"]["tasks"] for x in found} == {2}
    if figure == "fig7":
        sizes = {x["name"]: x["x"] for x in found}
        assert sizes["full"] == 1 > sizes["lambda 0.04"] > sizes["lambda 0.64"]
    else:
        # A decoded token reads at most the budget.
        assert all(x["x"] <= int(x["name"].split()[-1]) for x in found)


@pytest.mark.parametrize(
    ("figure", "option"), [("fig7", "data"), ("fig9", "data"), ("fig8", "texts")]
)
def test_files_that_are_missing_are_named(tmp_path, figure, option):
    done = call(figure, "--out", tmp_path, code=2)
    assert f"error: {option}: wanted" in done.output


def test_gates_are_found_by_the_models_name(tmp_path):
    small_gate().save(tmp_path / "llama-3.1-8b-instruct-0.16.pt")
    gate = setup.gates_of(str(tmp_path), published.LLAMA)
    assert gate(0.16).window == published.WINDOW
    with pytest.raises(FileNotFoundError, match=r"llama-3.1-8b-instruct-0.01.pt"):
        gate(0.01)


def test_published_numbers_are_those_of_the_abstract():
    """Its memory, 46 to 68 % less, and speedups are of 200K to 400K tokens and both models."""
    for which, more, less in ((0, 3.03, 4.0), (1, 1.8, 2.7)):
        values = {(x.curve, x.x): x.y for x in published.system(which)}
        for length in (200_000, 300_000, 400_000):
            assert more < values["full", length] / values["write gate", length] < less
    memory = {(x.curve, x.x): x.y for x in published.system(2)}
    parts = [1 - memory["write gate", x] / memory["full", x] for x in (200_000, 300_000, 400_000)]
    assert parts == pytest.approx([0.49, 0.56, 0.60], abs=0.005)


def test_a_chart_keeps_numbers_that_are_none(tmp_path):
    chart = Chart(
        title="t", x="a", y="b",
        points=[Point(curve="c", name="n", x=1.0, y=2.0, more={"m": 3.0}),
                Point(curve="c", name="o", x=2.0, y=math.nan)],
    )  # fmt: skip
    assert len(chart.write(tmp_path, "name")) == 3
    first, second = json.loads((tmp_path / "name.json").read_text())["points"]
    assert (first["y"], first["error"], second["y"]) == (2.0, None, None)
    assert "| c | n | 1 | 2 | 3 | measured here |" in (tmp_path / "name.md").read_text()


def test_finished_parts_are_read_and_others_refused(tmp_path):
    parts = Finished(tmp_path, {"steps": 3})
    assert parts.of("one", lambda: {"loss": 0.5}) == {"loss": 0.5}
    assert parts.of("one", lambda: pytest.fail("made again")) == {"loss": 0.5}
    with pytest.raises(ValueError, match="another steps"):
        Finished(tmp_path, {"steps": 4}).of("one", dict)
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        parts.of("one", dict)
