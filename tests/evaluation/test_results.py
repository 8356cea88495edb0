"""Quotients, their errors and the claims that are decided by them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from kvpolicy.evaluation.grid import claims  # noqa: E402
from kvpolicy.evaluation.sessions.estimates import ratio  # noqa: E402


def test_a_quotient_and_its_error():
    found = ratio([1.0, 2.0, 3.0], [2.0, 2.0, 4.0])
    # Means left out: 5/6, 4/6, 3/4.
    assert found.mean == 6 / 8
    assert found.standard_error == pytest.approx((2 / 3 * (2 * (1 / 12) ** 2)) ** 0.5)
    assert str(ratio([1.0], []).mean) == "nan"


def cell_row(variant, family, accuracy, held=100, read=None, task="eight needles", length=4096):
    read = held if read is None else read
    return {
        "task": task, "length": length, "variant": variant, "family": family, "keep": 0.125,
        "accuracy": accuracy, "loss": accuracy, "hit_loss": accuracy, "seen_tokens": 4200,
        "held_tokens": held, "read_tokens": read,
    }  # fmt: skip


def test_claims_are_decided_from_cells():
    good, bad = [0.9, 0.92, 0.94], [0.5, 0.52, 0.54]
    rows = [
        cell_row("full", "full", good, 4200),
        cell_row("gate a", "write gate", good, 1000),
        cell_row("gate b", "write gate", bad, 500),
        cell_row("gate c", "write gate", good, 2000),
        cell_row("local (gate a)", "local", bad, 1000),
        cell_row("SnapKV (gate b)", "SnapKV", good, 500),
        cell_row("gate a + Quest at 0.125", "gate + Quest", good, 1000, 512),
        cell_row("gate a + Quest at 0.25", "gate + Quest", good, 1000, 1024),
        cell_row("SnapKV at 0.125", "SnapKV at a cap", bad, 512),
        cell_row("gate a + SnapKV at 0.125", "gate + SnapKV at a cap", good, 500),
        cell_row("full", "full", good, 4200, task="eight facts"),  # one token, in the prompt
        cell_row("gate a", "write gate", good, 2000, task="eight facts"),
        cell_row("gate a + Quest at 0.1", "gate + Quest", good, 2000, 410, task="eight facts"),
        cell_row("SnapKV, question seen at 0.1", "SnapKV", good, 410, task="eight facts"),
        cell_row(
            "gate a + SnapKV, question seen at 0.1", "gate + SnapKV", bad, 410, task="eight facts"
        ),
        cell_row("full", "full", good, 4200, task="loss"),
        cell_row("gate b", "write gate", [x * 1.02 for x in good], 500, task="loss"),
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
