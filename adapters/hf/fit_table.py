"""A plan of memory as a table that a person reads."""

from __future__ import annotations

from typing import Protocol

from ..._table import Section, Table, part, size


class Planned(Protocol):
    """What a table needs of a `FitReport`."""

    @property
    def tokens(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def kept(self) -> float: ...
    @property
    def full(self) -> int: ...
    @property
    def full_total(self) -> int: ...
    @property
    def saving(self) -> float: ...


# Field of a plan, and what a person calls it.
CACHE = {
    "pages": "  pages, after the prompt",
    "ring": "  local windows",
    "positions": "  positions of tokens",
    "summaries": "  summaries of pages",
    "queries": "  queries observed",
    "numbers": "  numbers of tokens",
    "statistics": "  statistics of queries, inputs",
    "tables": "  page tables, counters",
    "reserved": "  reserved, at most",
    "cache": "the cache",
}
RARE = ("  numbers of tokens",)  # shown where there are any
ALL = {"weights": "  weights", "gates": "  gates", "total": "weights, gates and cache"}


def fit_table(plan: Planned) -> Table:
    """The cache's bytes by kind beside an ordinary cache's, and both with the weights."""
    sections = [
        _section("cache", {"full": "an ordinary cache", **CACHE}, plan, plan.full),
        _section("in all", {"full_total": "weights and an ordinary cache", **ALL}, plan,
                 plan.full_total),
    ]  # fmt: skip
    more = "less" if plan.saving >= 0 else "more"
    said = f"{abs(plan.saving):.0%} {more} than weights and a full cache"
    title = f"{plan.batch:,} x {plan.tokens:,} tokens: {plan.kept:.1%} of the tokens kept; {said}"
    return Table(title=title, sections=sections)


def _section(head: str, names: dict[str, str], plan: Planned, of: int) -> Section:
    found = {name: getattr(plan, field) for field, name in names.items()}
    rows = [
        (name, f"{n:,}", size(n), part(n, of)) for name, n in found.items() if n or name not in RARE
    ]
    return Section(heads=(head, "bytes", "", "of ordinary"), rows=rows)
