"""What all ranks of a tensor-parallel model hold, from what each one reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from .report import Report

_SUMS = (
    "pages", "reserved", "ring", "positions", "summaries", "tables", "queries", "numbers",
    "statistics", "states", "dense", "shared_pages", "cap_evicted",
)  # fmt: skip
_HEADS = ("admitted", "stored", "evicted", "read")  # [layer][head]


def joined(reports: Sequence[Report]) -> Report:
    """One report of the heads of all `reports`, in their order, which it holds as `ranks`."""
    first = reports[0]
    found: dict[str, Any] = {name: sum(getattr(x, name) for x in reports) for name in _SUMS}
    for name in _HEADS:
        layers = zip(*(getattr(x, name) for x in reports), strict=True)
        found[name] = [_side_by_side(parts) for parts in layers]
    return attrs.evolve(
        first,
        **found,
        overshoot=max(x.overshoot for x in reports),
        prompt_read=[_mean(x) for x in zip(*(x.prompt_read for x in reports), strict=True)],
        ranks=list(reports),
    )


def _side_by_side(parts: Sequence[list[float] | None]) -> list[float] | None:
    """The heads of a layer; None for one that only slides."""
    return None if parts[0] is None else [n for part in parts for n in part or ()]


def _mean(parts: Sequence[float | None]) -> float | None:
    known = [x for x in parts if x is not None]
    return sum(known) / len(known) if known else None
