"""What a benchmark finds: rows of numbers with their floors and goals."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Goal:
    """A wanted number and the one found; `at_most` says which side is good."""

    what: str
    wanted: float
    got: float
    at_most: bool = True

    @property
    def verdict(self) -> str:
        """ "met", "short" (missed by at most 10 %) or "missed"."""
        low, high = (self.got, self.wanted) if self.at_most else (self.wanted, self.got)
        return "met" if low <= high else "short" if low <= 1.1 * high else "missed"

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.what} {sign} {self.wanted:.4g}: {self.got:.4g} {self.verdict}"


@attrs.frozen(kw_only=True)
class Row:
    """One measurement.

    `value` in `unit` is what was measured, `rate` in `rate_unit` useful work over time, `floor` (in
    `unit`) the least that operations and bytes allow at the ceilings of the same run. `baseline`
    compares with others of the same run, `note` says how it was measured, `extra` holds further
    numbers. A row with an `error` has no value.
    """

    group: str
    name: str
    shape: str = ""
    value: float | None = None
    unit: str = "ms"
    rate: float | None = None
    rate_unit: str = ""
    floor: float | None = None
    goals: tuple[Goal, ...] = ()
    baseline: str = ""
    note: str = ""
    error: str = ""
    extra: dict[str, Any] = attrs.field(factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the verdicts."""
        found = attrs.asdict(self, recurse=False)
        found["goals"] = [attrs.asdict(g) | {"verdict": g.verdict} for g in self.goals]
        return found


class CheckFailed(Exception):
    """A result is wrong, so it is not timed."""
