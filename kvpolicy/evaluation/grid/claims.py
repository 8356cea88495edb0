"""What an evaluation shows about write gates, decided from its cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from ..._markdown import table
from ..sessions.estimates import Estimate, estimate, ratio, said
from ..tasks import TASKS, Task
from .records import Measured, Result
from .variants import FULL, SEEN

_EIGHTH = 0.125
_FURTHER = -0.01  # a smaller loss of accuracy counts as none
_BASELINES = ("local", "DuoAttention", "random", "SnapKV")


def claims(results: Sequence[Result]) -> list[str]:
    """Lines of Markdown: each claim on each task and length, what was found, and whether it holds.

    A bound on a quotient holds by its mean; one that lies within a standard error of the bound is
    marked. Nothing is claimed of tasks that the library does not know.
    """
    places = list(_places(results))
    found = [
        row
        for kind in (_kept, _ahead, _reading, _capped)
        for place in places
        for row in kind(place)
    ]
    if not found:
        return []
    head = ["claim", "task", "tokens", "composition", "found", "holds"]
    return ["## Claims", "", *table(head, found), ""]


@attrs.frozen(kw_only=True)
class _Place:
    """What was measured on one task at one length, by variant; full attention is among it."""

    task: Task
    length: int
    families: Mapping[str, str]
    measured: Mapping[str, Measured]

    def of(self, *families: str) -> Iterator[tuple[str, Measured]]:
        """Names and measurements of the variants of some families."""
        for name, found in self.measured.items():
            if self.families[name] in families:
                yield name, found

    def row(self, claim: str, what: str, found: Estimate, good: bool, bound: float) -> list[str]:
        """A claim on a number, and whether it holds."""
        close = abs(found.mean - bound) < found.standard_error
        verdict = f"{'yes' if good else 'no'}{', within its error' if close else ''}"
        return [claim, self.task.name, str(self.length), what, said(found), verdict]

    def gap(self, claim: str, one: str, other: str, least: float = 0.0) -> list[str]:
        """A claim that `one` scores above `other` by more than `least`, paired by context."""
        a, b = (self.measured[name].scores["accuracy"] for name in (one, other))
        found = estimate([x - y for x, y in zip(a, b, strict=True)])
        return self.row(claim, f"{one} - {other}", found, found.mean > least, least)


def _places(results: Sequence[Result]) -> Iterator[_Place]:
    for name, length in dict.fromkeys((x.task, x.length) for x in results):
        here = [x for x in results if (x.task, x.length) == (name, length)]
        measured = {x.variant: x.measured for x in here if x.measured is not None}
        if FULL in measured and name in TASKS:
            families = {x.variant: x.family for x in here}
            yield _Place(task=TASKS[name], length=length, families=families, measured=measured)


def _kept(place: _Place) -> Iterator[list[str]]:
    """Gates against full attention, by the part of the cache that they hold."""
    full = place.measured[FULL]
    for name, gate in place.of("write gate"):
        held = gate.footprint.held
        for bound in place.task.bounds:
            if held > bound.most:
                continue
            part = ratio(gate.scores[bound.score], full.scores[bound.score])
            below = bound.part < 1
            good = part.mean >= bound.part if below else part.mean <= bound.part
            claim = f"{bound.score.replace('_', ' ')} {'>=' if below else '<='} {bound.part:.0%}"
            claim = f"{claim} of full's, cache <= {bound.most:.3g}"
            yield place.row(claim, f"{name} ({held:.1%})", part, good, bound.part)


def _ahead(place: _Place) -> Iterator[list[str]]:
    """Gates against the policies that take as many bytes."""
    if place.task.retrieval:
        for gate, _ in place.of("write gate"):
            for family in _BASELINES:
                other = f"{family} ({gate})"
                if other in place.measured:
                    yield place.gap(f"ahead of {family} at equal bytes", gate, other)


def _reading(place: _Place) -> Iterator[list[str]]:
    """A gate with Quest reads an eighth and answers as the gate alone."""
    if place.length < 4096 or not place.task.decoded:
        return
    for name, both in place.of("gate + Quest"):
        read = both.footprint.read_tokens / place.length
        gate = name.partition(" + ")[0]
        if gate in place.measured and read <= _EIGHTH:
            claim = f"reads {read:.1%} of the context, no further loss (> {_FURTHER})"
            yield place.gap(claim, name, gate, _FURTHER)


def _capped(place: _Place) -> Iterator[list[str]]:
    """A gate with SnapKV against SnapKV alone under the same cap."""
    for name, family in place.families.items():
        alone = name.partition(" + ")[2]
        if SEEN in alone and not place.task.decoded:
            continue
        if family.startswith("gate + SnapKV") and {name, alone} <= place.measured.keys():
            yield place.gap("ahead of SnapKV under its cap", name, alone)
