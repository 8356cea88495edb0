"""Rows of model types: what was compared and timed in a process of its own for each."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .context import Bench, Case
from .families import FAMILIES
from .family_check import LIMIT, checks
from .family_times import times
from .rows import Goal, Row

MOST = 1.1  # times the kernels of a Llama
TOGETHER, PATIENCE = 6, 240.0  # types compared at a time; seconds for one
QUICK = ("gpt-oss", "Qwen3.5")  # sinks and rings; a state of its own. The others differ in sizes
POLICIES = 1e-3  # relative error of logits between two backends in float32
OTHERS = 1e-4  # of the kept tokens, where rounding decided
_WORK = {"checks": checks, "times": times}


def measured(bench: Bench, work: str, name: str) -> tuple[list[dict[str, Any]], str]:
    """What `work` told of `name` in a new process, and why it ended early.

    A failed assertion on the device ends a process for good, and only that one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "kvpolicy.adapters.hf"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, name, bench.quick, theirs), daemon=True)
    process.start()
    theirs.close()
    found: list[dict[str, Any]] = []
    patience = bench.pick(PATIENCE, 4 * PATIENCE)  # interpreted kernels, on few cores
    end = time.monotonic() + patience
    try:
        while ours.poll(max(end - time.monotonic(), 0)):
            told = ours.recv()
            if isinstance(told, str):
                return found, told
            found.append(told)
        return found, f"no answer within {patience:g} s"
    except EOFError:
        process.join()
        return found, f"it ended with exit code {process.exitcode}"
    finally:
        ours.close()
        process.kill()
        process.join()


def _child(work: str, name: str, quick: bool, pipe: Any) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        _WORK[work](Bench(quick, 4 * PATIENCE), name, pipe.send)
        pipe.send("")
    except Exception as error:  # told to the process that runs the others
        lines = str(error).strip().splitlines() or [""]
        pipe.send(f"{type(error).__name__}: {lines[0]}"[:300])


def compared(bench: Bench) -> Iterator[Row]:
    """Logits of every type with a pipeline beside its own attention, against float64."""
    names = bench.pick(tuple(FAMILIES), QUICK)
    with ThreadPoolExecutor(bench.pick(TOGETHER, 2)) as pool:
        runs = pool.map(functools.partial(measured, bench, "checks"), names)
        for name, (found, error) in zip(names, runs, strict=True):
            yield from (_compared(name, told) for told in found)
            if error:
                yield Row(group="families", name=f"{name}: compared", error=error)


def _compared(name: str, told: dict[str, Any]) -> Row:
    if told["name"] == "gate + Quest + SnapKV":
        error, goals = told["error"], []
        if error is not None and told["other"]:
            part = told["other"] / told["kept"]
            goals = [Goal(what="other tokens kept", wanted=OTHERS, got=part)]
        elif error is not None:
            goals = [Goal(what="of the reference", wanted=POLICIES, got=error)]
        return Row(
            group="families", name=f"{name}: {told['name']}, {told['dtype']}", unit="relative",
            value=error, goals=tuple(goals), extra=told,
            note=f"{told['decoding']}, {told['other']} of {told['kept']} kept are others",
            error="" if told["finite"] else "logits are not finite",
        )  # fmt: skip
    return Row(
        group="families", name=f"{name}: logits, {told['name']}", value=told["error"],
        unit="relative",
        goals=(Goal(what="of its own attention's error", wanted=LIMIT, got=told["ratio"]),),
        shape=f"3 rows of {told['tokens']} columns{', padded' if told['padded'] else ''}",
        baseline=f"its own attention {told['own error']:.3g}", note=told["decoding"], extra=told,
    )  # fmt: skip


def timed(bench: Bench, name: str) -> Iterator[Row]:
    """Decode steps of one type."""
    found, error = measured(bench, "times", name)
    llama: dict[str, Any] = {}
    for told in found:
        llama |= told if "tokens" not in told else {}
    for told in (told for told in found if "tokens" in told):
        for word in ("dense", "gate"):
            yield _step(name, word, told)
            if told.get(f"{word} kernels"):
                yield _kernels(name, word, told, llama)
    if error:
        yield Row(group="families", name=f"{name}: times", error=error)


def _step(name: str, word: str, told: dict[str, Any]) -> Row:
    own = {kind: told[kind] for kind in ("dynamic", "static")}
    taken, goals = told.get(word), []
    if taken is not None and word == "dense" and isinstance(own["dynamic"], float):
        goals = [Goal(what="of transformers", wanted=1.0, got=taken / own["dynamic"])]
    said = (f"{k} {x:.4g} ms" if isinstance(x, float) else f"{k} {x}" for k, x in own.items())
    return Row(
        group="families", name=f"{name}: step, {word}, {told['tokens']} tokens", value=taken,
        goals=tuple(goals), baseline=", ".join(said), note=told.get(f"{word} decoding", ""),
        error="" if taken is not None else str(told.get("error", "")), extra=told,
    )  # fmt: skip


def _kernels(name: str, word: str, told: dict[str, Any], others: dict[str, Any]) -> Row:
    goals, taken = [], told[f"{word} kernels"]
    llama = others.get(f"llama {told['tokens']}")
    if word == "dense" and llama:
        goals = [Goal(what="of a Llama's", wanted=MOST, got=taken / llama)]
    said = "" if llama is None else f"Llama {llama:.4g} us"
    if others.get("copied"):
        said += f" beside copies of {others['copied'] >> 20} MB a layer"
    return Row(
        group="families", name=f"{name}: kernels, {word}, {told['tokens']} tokens", value=taken,
        unit="us", goals=tuple(goals), baseline=said,
        note=", ".join(f"{k} {x:.1f}" for k, x in told[f"{word} by kernel"].items()),
    )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    found = [Case(group="families", name="compared", run=compared, seconds=60, rank=80)]
    for place, name in enumerate(FAMILIES):
        run = functools.partial(_timed, name)
        found.append(Case(group="families", name=f"{name}: times", run=run, rank=81 + place,
                          seconds=20))  # fmt: skip
    return found if not bench.quick else [found[0], *found[1:2]]


def _timed(name: str, bench: Bench) -> Iterator[Row]:
    return timed(bench, name)
