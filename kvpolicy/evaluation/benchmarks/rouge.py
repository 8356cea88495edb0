"""ROUGE-L as the package `rouge` 1.0.1 computes it, which LongBench and LooGLE use.

Over whole texts: sentences end at full stops, and what counts are the different words that the
longest common subsequences of their sentences have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Rouge(NamedTuple):
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def rouge_l(answer: str, reference: str) -> Rouge:
    """ROUGE-L of two texts; zeros where one of them has no words."""
    found, wanted = _sentences(answer), _sentences(reference)
    ours, theirs = {w for s in found for w in s}, {w for s in wanted for w in s}
    if not ours or not theirs:
        return Rouge(0.0, 0.0, 0.0)
    common = {word for a in wanted for b in found for word in _common(a, b)}
    precision, recall = len(common) / len(ours), len(common) / len(theirs)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return Rouge(precision, recall, f1)


def _sentences(text: str) -> list[list[str]]:
    return [words for part in text.split(".") if (words := part.split())]


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the package takes."""
    rows = [[0] * (len(b) + 1)]
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(rows[-1][j] + 1 if word == other else max(rows[-1][j + 1], row[j]))
        rows.append(row)
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
