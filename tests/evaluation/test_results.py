"""Quotients, their errors and the claims that are decided by them."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

pytest.importorskip("transformers")

from kvpolicy.evaluation.grid import claims, results, tables  # noqa: E402
from kvpolicy.evaluation.grid.records import (  # noqa: E402
    Footprint,
    Measured,
    Result,
    from_json,
    to_json,
)
from kvpolicy.evaluation.sessions.estimates import ratio  # noqa: E402


def test_a_quotient_and_its_error():
    found = ratio([1.0, 2.0, 3.0], [2.0, 2.0, 4.0])
    # Means left out: 5/6, 4/6, 3/4.
    assert found.mean == 6 / 8
    assert found.standard_error == pytest.approx((2 / 3 * (2 * (1 / 12) ** 2)) ** 0.5)
    assert str(ratio([1.0], []).mean) == "nan"


def cell_of(variant, family, accuracy, held=100, read=None, task="eight needles", length=4096):
    footprint = Footprint(
        held_tokens=held,
        seen_tokens=4200,
        read_tokens=held if read is None else read,
        bytes=1.0,
        kv_bytes=1.0,
        slots=held,
        admitted=1.0,
        evicted=0.0,
    )
    scores = dict.fromkeys(("loss", "hit_loss") if task == "loss" else ("accuracy",), accuracy)
    measured = Measured(scores=scores, footprint=footprint, seconds=1.0, questions=8)
    return Result(
        task=task,
        length=length,
        variant=variant,
        family=family,
        keep=0.125,
        seed=0,
        measured=measured,
    )


def test_claims_are_decided_from_cells():
    good, bad = [0.9, 0.92, 0.94], [0.5, 0.52, 0.54]
    rows = [
        cell_of("full", "full", good, 4200),
        cell_of("gate a", "write gate", good, 1000),
        cell_of("gate b", "write gate", bad, 500),
        cell_of("gate c", "write gate", good, 2000),
        cell_of("local (gate a)", "local", bad, 1000),
        cell_of("SnapKV (gate b)", "SnapKV", good, 500),
        cell_of("gate a + Quest at 0.125", "gate + Quest", good, 1000, 512),
        cell_of("gate a + Quest at 0.25", "gate + Quest", good, 1000, 1024),
        cell_of("SnapKV at 0.125", "SnapKV at a cap", bad, 512),
        cell_of("gate a + SnapKV at 0.125", "gate + SnapKV at a cap", good, 500),
        cell_of("full", "full", good, 4200, task="eight facts"),  # one token, in the prompt
        cell_of("gate a", "write gate", good, 2000, task="eight facts"),
        cell_of("gate a + Quest at 0.1", "gate + Quest", good, 2000, 410, task="eight facts"),
        cell_of("SnapKV, question seen at 0.1", "SnapKV", good, 410, task="eight facts"),
        cell_of(
            "gate a + SnapKV, question seen at 0.1", "gate + SnapKV", bad, 410, task="eight facts"
        ),
        cell_of("full", "full", good, 4200, task="loss"),
        cell_of("gate b", "write gate", [x * 1.02 for x in good], 500, task="loss"),
        cell_of("full", "full", good, 4200, task="a task of one's own"),
        cell_of("gate a", "write gate", bad, 500, task="a task of one's own"),
    ]
    lines = claims.claims(rows)
    told = {tuple(line.strip("| ").split(" | ")[i] for i in (0, 3, 5)) for line in lines[4:-1]}
    assert told == {
        ("accuracy >= 98% of full's, cache <= 0.25", "gate a (23.8%)", "yes"),
        ("accuracy >= 98% of full's, cache <= 0.25", "gate b (11.9%)", "no"),
        ("accuracy >= 95% of full's, cache <= 0.125", "gate b (11.9%)", "no"),
        ("loss <= 101% of full's, cache <= 0.25", "gate b (11.9%)", "no"),
        ("hit loss <= 105% of full's, cache <= 0.25", "gate b (11.9%)", "yes"),
        ("ahead of local at equal bytes", "gate a - local (gate a)", "yes"),
        ("ahead of SnapKV at equal bytes", "gate b - SnapKV (gate b)", "no"),
        (
            "reads 12.5% of the context, no further loss (> -0.01)",
            "gate a + Quest at 0.125 - gate a",
            "yes",
        ),
        ("ahead of SnapKV under its cap", "gate a + SnapKV at 0.125 - SnapKV at 0.125", "yes"),
    }
    assert claims.claims(rows[1:2]) == []


def test_the_recorded_evaluation_reads_and_tells_the_same():
    """The files of version 0.1.0 that the docs show."""
    folder = Path(__file__).resolve().parents[2] / "docs/measurements/learning"
    record = json.loads((folder / "results.json").read_text())
    cells = [from_json(cell) for cell in record.pop("cells")]
    assert len(cells) == 327
    text = tables.summary(record, cells, "smollm2, bfloat16, cuda")
    assert text == (folder / "results.md").read_text()


SETTINGS = {"model": "tiny", "seed": 0}
DONE = cell_of("full", "full", (0.5, float("nan")), 4200)
FAILED = attrs.evolve(DONE, variant="gate a", measured=None, failed="no memory")
SMALL = attrs.evolve(DONE, variant="gate b", measured=None, skipped="cannot be this small")


@pytest.mark.parametrize("result", [DONE, FAILED, SMALL], ids=["measured", "failed", "skipped"])
def test_a_result_comes_back_as_it_was(result, tmp_path):
    store = results.Store(tmp_path)
    store.open(SETTINGS, {})
    store.add(result)
    assert repr(results.Store(tmp_path).open(SETTINGS, {})) == repr([result])


def test_the_last_word_on_a_failed_cell_counts(tmp_path):
    store = results.Store(tmp_path / "new")
    assert store.open(SETTINGS, {}) == []
    store.add(FAILED)
    store.add(attrs.evolve(FAILED, failed="still none"))
    assert [x.failed for x in store.open(SETTINGS, {})] == ["still none"]
    good = attrs.evolve(DONE, variant="gate a")
    store.add(good)
    assert [x.failed for x in store.open(SETTINGS, {})] == [""]
    store.add(good)
    with pytest.raises(ValueError, match=r"cells\.jsonl line 4: .* gate a stands in an earlier"):
        store.open(SETTINGS, {})


def test_files_of_0_1_0_load_and_their_failed_cells_are_tried_again(tmp_path):
    record = {"settings": SETTINGS, "made_with": [{"torch": "2.11"}]}
    (tmp_path / "settings.json").write_text(json.dumps(record))
    cell = {"task": "copy", "length": 64, "family": "local", "keep": 0.5, "seed": 0}
    reasons = {"a": "cannot be this small", "b": "length: got 64 tokens, too few for 8 passages"}
    lines = [json.dumps({**cell, "variant": v, "skipped": r}) for v, r in reasons.items()]
    (tmp_path / "cells.jsonl").write_text("\n".join([*lines, ""]))
    small, failed = results.Store(tmp_path).open(SETTINGS, {"torch": "2.13"})
    assert (small.skipped, small.failed) == (reasons["a"], "")
    assert (failed.skipped, failed.failed) == ("", reasons["b"])
    record = json.loads((tmp_path / "settings.json").read_text())
    assert record["format"] == 2 and len(record["made_with"]) == 2
    (tmp_path / "settings.json").write_text(json.dumps({**record, "format": 3}))
    with pytest.raises(ValueError, match=r"settings\.json: wanted format 1 or 2, got 3"):
        results.Store(tmp_path).open(SETTINGS, {})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "wanted the fields of a cell, got list"),
        ("{", "wanted JSON, got '{'"),
        ("[" * 100_000, "wanted JSON, got"),
        ('{"task": 3}', "task: wanted str, got 3"),
        (json.dumps({**to_json(DONE), "length": True}), "length: wanted int, got True"),
        (json.dumps({**to_json(DONE), "accuracy": "high"}), "accuracy: wanted a list of numbers"),
        (json.dumps({**to_json(FAILED), "failed": None}), "failed: wanted str, got None"),
        (json.dumps({k: v for k, v in to_json(DONE).items() if k != "slots"}), "slots: wanted"),
        (json.dumps({k: v for k, v in to_json(DONE).items() if k != "accuracy"}), "wanted one of"),
    ],
)
def test_a_damaged_line_is_named(line, said, tmp_path):
    store = results.Store(tmp_path)
    store.open(SETTINGS, {})
    store.add(SMALL)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"cells\.jsonl line 2: ") as error:
        store.open(SETTINGS, {})
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 1, "made_with": []}', '{"settings": {}}'])
def test_damaged_settings_are_named(text, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json: .*wanted"):
        results.Store(tmp_path).open(SETTINGS, {})


def test_a_separator_of_lines_inside_a_cell_is_no_line(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {}, "made_with": []}))
    odd = attrs.evolve(SMALL, variant="gate \u2028 b")
    (tmp_path / "cells.jsonl").write_text(
        json.dumps(to_json(odd), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert results.Store(tmp_path).open({}, {}) == [odd]


@pytest.mark.parametrize("file", ["settings.json", "cells.jsonl"])
def test_a_disk_that_fails_costs_no_finished_cell(file, tmp_path, monkeypatch):
    store = results.Store(tmp_path)
    store.open(SETTINGS, {})
    store.add(SMALL)
    with (tmp_path / "cells.jsonl").open("a") as cells:
        cells.write('{"task": "co')  # what an interrupted run leaves
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(self, text, **options):
        if not self.name.startswith((file, "results")):
            return write(self, text, **options)
        write(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            store.open(SETTINGS, {})
    with pytest.raises(OSError, match="No space"):
        results.write_results(tmp_path, store.record(), [SMALL], "text")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert store.open(SETTINGS, {}) == [SMALL]
    assert (tmp_path / "cells.jsonl").read_text().count("\n") == 1
