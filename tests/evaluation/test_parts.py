"""Cells in parts: each in one part, beside those whose bytes it takes; merged they are a run."""

from __future__ import annotations

import attrs
import pytest

pytest.importorskip("transformers")

from kvpolicy.evaluation.grid.method_table import method_tables  # noqa: E402
from kvpolicy.evaluation.grid.parts import dealt, folder_of, found_parts  # noqa: E402
from kvpolicy.evaluation.grid.records import Footprint, Measured, Result  # noqa: E402
from kvpolicy.evaluation.grid.results import Store  # noqa: E402
from kvpolicy.evaluation.grid.variants import SEEN, cells, variants  # noqa: E402
from kvpolicy.evaluation.tasks import TASKS  # noqa: E402
from tests.support.evaluation.small import small_gate  # noqa: E402

SETTINGS = {"seed": 0, "parts": 3}
SIZE = Footprint(
    held_tokens=25, seen_tokens=100, read_tokens=25, bytes=9, kv_bytes=8, slots=25, admitted=1,
    evicted=75,
)  # fmt: skip


def result(family, accuracy, keep=1.0, task="one"):
    measured = Measured(scores={"accuracy": accuracy}, footprint=SIZE, seconds=1.0)
    name = family if keep == 1 else f"{family} {keep}"
    return Result(
        task=task, length=64, variant=name, family=family, keep=keep, seed=0, measured=measured
    )


def test_parts_are_all_cells_and_a_size_is_matched_where_it_was_measured():
    gates = [("a", small_gate()), ("b", small_gate())]
    rows = variants(gates, None, [0.25], [0.125], 32)
    whole = cells([TASKS["copy"], TASKS["loss"]], [2048, 64], rows)
    parts = [dealt(whole, (number, 3)) for number in range(3)]
    assert sorted((x.key for part in parts for x in part), key=str) == sorted(
        (x.key for x in whole), key=str
    )
    assert all(part == [x for x in whole if x in part] for part in parts)
    for part in parts:
        keys = {x.key for x in part}
        assert all((*x.key[:2], x.variant.matches) in keys for x in part if x.variant.matches)
        assert len(part) > len(whole) / 6


def test_what_parts_have_measured_is_put_together(tmp_path):
    for number in (0, 2):
        store = Store(folder_of(tmp_path, (number, 3)))
        store.open(SETTINGS, {"device": str(number)})
        store.add(result(f"m{number}", (0.5, 0.7)))
    record, parts, missing = found_parts(tmp_path, 3)
    assert missing == [1] and [[x.variant for x in part] for part in parts] == [["m0"], ["m2"]]
    assert record["made_with"] == [{"device": "0"}, {"device": "2"}]
    Store(folder_of(tmp_path, (1, 3))).open(SETTINGS | {"seed": 1}, {})
    with pytest.raises(ValueError, match="part-1-of-3 was made with other settings"):
        found_parts(tmp_path, 3)


def test_methods_stand_in_one_table_a_size_and_kind_of_question():
    results = [
        result("full", (1.0, 0.8)),
        result("A", (0.2, 0.4), 0.25),
        result("B", (0.5, 0.5), 0.25),
        result("B", (0.1, 0.1), 0.25, task="two"),
        result("C", (0.99, 0.99), 0.25),
        result(f"A{SEEN}", (0.6, 0.6), 0.25),
    ]
    results.append(attrs.evolve(result("D", (1.0,), 0.25), measured=None, skipped="too small"))
    text = "\n".join(method_tables(results, {"X": "wants a file"}))
    unseen, seen = text.split("## Methods at 0.25 of the cache, the question ")[1:]
    rows = [line.split(" | ")[0].strip("| ") for line in unseen.splitlines() if "| " in line]
    assert unseen.startswith("unseen") and rows == ["method", "---", "B", "C", "full", "A"]
    assert "| A | 25% | .30 |" in unseen and "| B | 25% | .50 | .10 |" in unseen
    assert seen.startswith("seen") and "| A | 25% | .60 |" in seen and "| B |" not in seen
    assert "at most 0.100" in text and text.endswith("Left out: X (wants a file).\n")
