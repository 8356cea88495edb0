"""Runs benchmarks within a time limit; one that fails costs its own rows only."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch

from ..errors import BackendError
from .context import Bench, Case
from .output import machine, print_table, write_results
from .plots import draw
from .rows import CheckFailed, Row

GROUPS = (
    *("prefill", "tiles", "decode", "quest", "write", "snapkv", "evictions"),
    *("decoders", "model", "launches", "families", "many", "training"),
    *("profile", "prompts", "first-call", "vllm"),
)
_MODULES = (
    *("prefill", "tiles", "decode", "write", "snapkv", "evictions", "decoders"),
    *("end_to_end", "launches", "family_rows", "many", "training"),
    *("profiles", "prompts", "first_call", "engine"),
)
_SHARED = ("end_to_end", "profiles")  # of models whose heads several devices share


def run(
    names: Sequence[str] = (),
    *,
    out: str | os.PathLike[str] = "bench/out",
    quick: bool = False,
    seconds: float = 540.0,
    starts: Callable[[str, int, int], object] = lambda title, number, of: None,
    rank: int = 0,
    ranks: int = 1,
) -> list[Row]:
    """Checks and times, writes `results.json`, `results.md` and plots to `out`, prints a table.

    Args:
        names: groups (see GROUPS), whole titles ("model: gate, 100K") or parts of them; all by
            default.
        out: folder for the results; it is made if needed.
        quick: tiny shapes, which also run without a GPU (kernels interpreted).
        seconds: benchmarks that would end later are not started; the important ones come first.
        starts: called with each benchmark's title, its number from 0 and how many there are.
        rank: of this process, of `ranks` that share the heads of the models of the groups "model"
            and "profile"; rank 0 writes and prints.

    Raises:
        BackendError: there is no CUDA device and `quick` is not set.
        ValueError: a name matches no benchmark.
    """
    if not torch.cuda.is_available():
        if not quick:
            raise BackendError("bench: wanted a CUDA device, found none; --quick needs none")
        os.environ.setdefault("TRITON_INTERPRET", "1")
    bench = Bench(quick, seconds, rank, ranks)
    chosen = choose(bench, names)
    rows = bench.measure_ceilings()
    for number, case in enumerate(chosen, 1):
        title = _title(case)
        starts(title, number - 1, len(chosen))
        bench.say(f"{number}/{len(chosen)} {title}")
        needed = bench.pick(case.seconds, 1.0)
        if bench.left() < needed:
            text = f"not started: {max(bench.left(), 0):.0f} s left, about {needed:.0f} s needed"
            rows.append(Row(group=case.group, name=case.name, error=text))
            continue
        rows += attempt(bench, case)
        if rank == 0:
            write_results(Path(out), bench, rows)
    if rank:
        return rows
    write_results(Path(out), bench, rows)
    try:
        draw(Path(out), rows, str(machine(bench)["device"]))
    except Exception as error:  # pictures must not cost the numbers
        bench.say(f"no plots: {type(error).__name__}: {error}")
    print_table(rows)
    return rows


def choose(bench: Bench, names: Sequence[str]) -> list[Case]:
    """The cases that `names` ask for, important ones first."""
    own = _MODULES if bench.ranks == 1 else _SHARED
    modules = [importlib.import_module(f".{name}", __package__) for name in own]
    found: list[Case] = sorted(
        (case for module in modules for case in module.cases(bench)), key=lambda case: case.rank
    )
    for name in names:
        if not any(_named(case, name) for case in found):
            if name == "vllm" and bench.ranks == 1:
                raise BackendError("vllm: vLLM is not installed here")
            raise ValueError(
                f"names: wanted one of {', '.join(GROUPS)} or part of a name, got {name!r}"
            )
    titles = {_title(case) for case in found}
    return [
        case
        for case in found
        # A whole title means that case, not those whose titles go on after it.
        if not names
        or any(_title(case) == name if name in titles else _named(case, name) for name in names)
    ]


def _title(case: Case) -> str:
    return f"{case.group}: {case.name}"


def _named(case: Case, name: str) -> bool:
    return name == case.group if name in GROUPS else name in _title(case)


def attempt(bench: Bench, case: Case) -> list[Row]:
    """The case's rows; an error becomes a row after those that were finished."""
    rows: list[Row] = []
    try:
        for row in case.run(bench):
            # Tiny shapes say nothing about goals.
            rows.append(attrs.evolve(row, goals=()) if bench.quick else row)
    except Exception as error:  # any failure: the other benchmarks still count
        text = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        rows.append(Row(group=case.group, name=case.name, error=f"{kind}{text[0]}"[:300]))
        bench.say(f"  failed: {rows[-1].error}")
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows
