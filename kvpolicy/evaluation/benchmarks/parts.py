"""Runs in parts: which part a process takes, and parts put together."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from ..grid.records import Measured, Result
from ..grid.results import Record, Store
from .runner import mean_footprint

#: Variables of launchers: this process's number and how many there are.
VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def part_of(text: str | None, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Which part of how many "i/n" says, from 0 to n - 1; default what a launcher says.

    Raises:
        ValueError: it is no such pair.
    """
    given = os.environ if environment is None else environment
    if text is None:
        pairs = [(given[a], given[b]) for a, b in VARIABLES if a in given and b in given]
        text = "/".join(pairs[0]) if pairs else "0/1"
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"part: wanted i/n with i from 0 to n - 1, got {text!r}")
    return int(match[1]), int(match[2])


def folder_of(out: Path, part: tuple[int, int]) -> Path:
    """Where a part's results lie; a whole run's lie in the folder itself."""
    number, of = part
    return out if of == 1 else out / f"part-{number}-of-{of}"


def merged(out: Path, of: int) -> tuple[Record, list[Result], list[int]]:
    """The record and results of all parts in a folder, and the numbers of those that are missing.

    Raises:
        ValueError: parts were made with different settings.
    """
    stores = [Store(folder_of(out, (number, of))) for number in range(of)]
    there = [x for x in stores if (x.folder / "settings.json").exists()]
    missing = [i for i, x in enumerate(stores) if x not in there]
    records = [x.record() for x in there]
    for record, store in zip(records, there, strict=True):
        if record["settings"] != records[0]["settings"]:
            raise ValueError(f"out: {store.folder} was made with other settings than other parts")
    made = [x for record in records for x in record["made_with"]]
    whole = {**records[0], "made_with": [x for i, x in enumerate(made) if x not in made[:i]]}
    found = [x.read() for x in there]
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
