"""What an evaluation shows about write gates, decided from its cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..._markdown import table
from ..sessions.estimates import estimate, ratio, said
from .results import Row
from .variants import FULL, LOSS, SEEN

QUARTER, EIGHTH = 0.25, 0.125
_NEEDLES, _COPY = ("eight needles", "one needle"), ("copy",)
_FACTS = ("eight facts", "one fact")
_RETRIEVAL = (*_NEEDLES, *_COPY, *_FACTS, "key-value")
#: Largest part of the cache, tasks, score, and its bound as a part of full attention's.
_BOUNDS: tuple[tuple[float, tuple[str, ...], str, float], ...] = (
    (QUARTER, (*_NEEDLES, *_COPY), "accuracy", 0.98),
    (QUARTER, _FACTS, "accuracy", 0.95),
    (EIGHTH, _NEEDLES, "accuracy", 0.95),
    (QUARTER, (LOSS,), "loss", 1.01),
    (QUARTER, (LOSS,), "hit_loss", 1.05),
)
# A fact is one token, and a prompt with its question decides it: selections, and evictions that
# come after the question, act on later ones.
_DECODED = (*_NEEDLES, *_COPY, "key-value")
_FURTHER = -0.01  # a smaller loss of accuracy counts as none
_BASELINES = ("local", "DuoAttention", "random", "SnapKV")


def claims(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: each claim on each task and length, what was found, and whether it holds.

    A bound on a quotient holds by its mean; one that lies within a standard error of the bound is
    marked.
    """
    found = [*_kept(rows), *_ahead(rows), *_reading(rows), *_capped(rows)]
    if not found:
        return []
    head = ["claim", "task", "tokens", "composition", "found", "holds"]
    return ["## Claims", "", *table(head, found), ""]


def _here(rows: Sequence[Row]) -> Iterator[tuple[str, int, dict[str, Row]]]:
    """Task, length and the measured rows by variant, full attention among them."""
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        here = {
            row["variant"]: row
            for row in rows
            if (row["task"], row["length"]) == (task, length) and "skipped" not in row
        }
        if FULL in here:
            yield task, length, here


def _kept(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Gates against full attention, by the part of the cache that they hold."""
    for task, length, here in _here(rows):
        for row in here.values():
            if row["family"] != "write gate":
                continue
            held = row["held_tokens"] / row["seen_tokens"]
            for most, tasks, score, bound in _BOUNDS:
                if held > most or task not in tasks:
                    continue
                part = ratio(row[score], here[FULL][score])
                good = part.mean >= bound if bound < 1 else part.mean <= bound
                close = abs(part.mean - bound) < part.standard_error
                sign = ">=" if bound < 1 else "<="
                claim = f"{score.replace('_', ' ')} {sign} {bound:.0%} of full's"
                claim = f"{claim}, cache <= {most:.3g}"
                name = f"{row['variant']} ({held:.1%})"
                yield [claim, task, str(length), name, said(part), _verdict(good, close)]


def _ahead(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Gates against the policies that take as many bytes."""
    for task, length, here in _here(rows):
        if task not in _RETRIEVAL:
            continue
        for gate in [row for row in here.values() if row["family"] == "write gate"]:
            for family in _BASELINES:
                other = here.get(f"{family} ({gate['variant']})")
                if other is not None:
                    claim = f"ahead of {family} at equal bytes"
                    yield _gap(claim, task, length, gate, other, 0.0)


def _reading(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A gate with Quest reads an eighth and answers as the gate alone."""
    for task, length, here in _here(rows):
        for row in here.values():
            if row["family"] != "gate + Quest" or length < 4096 or task not in _DECODED:
                continue
            read = row["read_tokens"] / length
            gate = here.get(row["variant"].partition(" + ")[0])
            if gate is not None and read <= EIGHTH:
                claim = f"reads {read:.1%} of the context, no further loss (> {_FURTHER})"
                yield _gap(claim, task, length, row, gate, _FURTHER)


def _capped(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A gate with SnapKV against SnapKV alone under the same cap."""
    for task, length, here in _here(rows):
        for row in here.values():
            name = row["variant"].partition(" + ")[2]
            if SEEN in name and task not in _DECODED:
                continue
            if row["family"].startswith("gate + SnapKV") and name in here:
                yield _gap("ahead of SnapKV under its cap", task, length, row, here[name], 0.0)


def _gap(claim: str, task: str, length: int, row: Row, other: Row, least: float) -> list[str]:
    """A claim that `row` scores above `other` by more than `least`, paired by context."""
    gaps = [a - b for a, b in zip(row["accuracy"], other["accuracy"], strict=True)]
    found = estimate(gaps)
    close = abs(found.mean - least) < found.standard_error
    name = f"{row['variant']} - {other['variant']}"
    return [claim, task, str(length), name, said(found), _verdict(found.mean > least, close)]


def _verdict(good: bool, close: bool) -> str:
    return f"{'yes' if good else 'no'}{', within its error' if close else ''}"
