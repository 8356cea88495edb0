"""Runs in parts: which part a process takes, where its results lie, and parts put together."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .records import Result
from .results import Record, Store
from .variants import Cell

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


def found_parts(out: Path, of: int) -> tuple[Record, list[list[Result]], list[int]]:
    """The record of the parts in a folder, the results of each, and the numbers that are missing.

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
    return whole, [x.read() for x in there], missing


def dealt(found: Sequence[Cell], part: tuple[int, int]) -> list[Cell]:
    """The cells of a part, in their order: every n-th, and with it those that take its bytes."""
    number, of = part
    leads = [(x.task.name, x.length, x.variant.matches or x.variant.name) for x in found]
    places = {lead: place for place, lead in enumerate(dict.fromkeys(leads))}
    return [x for x, lead in zip(found, leads, strict=True) if places[lead] % of == number]
