"""Parts of a benchmark put together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import attrs

from ..grid.parts import found_parts
from ..grid.records import Measured, Result
from ..grid.results import Record
from .runner import mean_footprint


def merged(out: Path, of: int) -> tuple[Record, list[Result], list[int]]:
    """The record and results of all parts in a folder, and the numbers of those that are missing.

    Raises:
        ValueError: parts were made with different settings.
    """
    whole, found, missing = found_parts(out, of)
    keys = list(dict.fromkeys(result.key for results in found for result in results))
    by_key = [{result.key: result for result in results} for results in found]
    results = []
    for key in keys:
        parts = [x[key] for x in by_key if key in x]
        if len(parts) == of:
            results.append(_together(parts))
        else:
            why = f"{len(parts)} of {of} parts have measured it"
            results.append(attrs.evolve(parts[0], measured=None, skipped="", failed=why))
    return whole, results, missing


def _together(parts: Sequence[Result]) -> Result:
    """One cell of its parts; one that failed or was skipped in a part is so as a whole."""
    for part in parts:
        if part.failed:
            return part
    for part in parts:
        if part.skipped:
            return part
    done = [x.measured for x in parts if x.measured is not None]
    weights = [len(x.contexts) for x in done]
    order = sorted(
        (place, score)
        for x in done
        for place, score in zip(x.contexts, x.scores["score"], strict=True)
    )

    def mean(name: str) -> float | None:
        values = [getattr(x, name) for x in done]
        return None if None in values else statistics.fmean(values, weights)

    return attrs.evolve(
        parts[0],
        measured=Measured(
            scores={"score": tuple(score for _, score in order)},
            footprint=mean_footprint([x.footprint for x in done], weights),
            seconds=sum(x.seconds for x in done),
            questions=sum(x.questions for x in done),
            contexts=tuple(place for place, _ in order),
            kv_footprint=mean("kv_footprint"),
            first_token=mean("first_token"),
            dropped=mean("dropped"),
            held_after=mean("held_after"),
        ),
    )
