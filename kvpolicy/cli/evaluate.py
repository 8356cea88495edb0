"""`kvpolicy evaluate`: tasks x compositions x cache sizes, in a time box."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._fields import MOST, check_number
from .benchmarks import RATIOS, Prompted, refuse, run_benchmark
from .common import (
    GOES_ON,
    SMOLLM2,
    Device,
    Duo,
    Model,
    OfWeights,
    Trust,
    check_fractions,
    errors,
    load,
    read,
    shipped,
)
from .own import own_pipeline
from .progress import Asked, Progress
from .record import chosen, digest, made_with

if TYPE_CHECKING:
    from ..evaluation.grid.runner import Runner
    from ..evaluation.grid.variants import Cell
    from ..evaluation.tasks import Task


def evaluate(
    model: Model = SMOLLM2,
    out: Annotated[Path, typer.Option(help="Folder of results; a run goes on with them.")] = Path(
        "evaluation/out"
    ),
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 10.0,
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks; default all but one-question.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MOST, help="Context tokens. [2048 4096 8192 1024]"),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Only compositions of this name, or whose name starts so."),
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Contexts of a cell; default 8, benchmarks 25 or more."),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Questions of a cell at least; benchmarks: 200."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="A .txt file or a folder of them; default Python's manual.", exists=True),
    ] = None,
    gate: Annotated[
        list[Path] | None,
        typer.Option(help="Write gates, the largest cache first; default: smollm2's."),
    ] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Thresholds of every gate, not its own.")
    ] = None,
    duo: Duo = None,
    pipeline: Annotated[
        list[str] | None,
        typer.Option(help="Pipelines' files, or CachePipelines of yours: module:name."),
    ] = None,
    trust_code: Trust = False,
    keep: Annotated[
        list[float] | None,
        typer.Option(help="Parts of the cache, where there are no gates. [0.25 0.1]"),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Parts of the context that Quest reads and SnapKV leaves. [0.125 0.25 0.0625]"
        ),
    ] = None,
    methods: Annotated[
        bool,
        typer.Option("--methods", help="Every method of docs/policies.md at each --keep instead."),
    ] = False,
    density: Annotated[
        list[float] | None,
        typer.Option(
            help="Parts of the blocks that XAttention reads while prefilling, instead: beside its "
            "own thresholds, with the part that these find."
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD=FILE: a file of the model for --methods, such as Q-Filters=FILE."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=1, max=MOST, help="Local window without a gate.")] = 64,
    page_size: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a page.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    device: Device = None,
    dtype: OfWeights = None,
    eager: Annotated[bool, typer.Option("--eager", help="No captured decoding.")] = False,
    progress: Asked = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="ruler, niah, longbench, helmet, ... or a .jsonl file of questions."),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="A benchmark's files, or folders.", exists=True)
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Parts of a benchmark's context to evict. [0.25 0.5 0.75 0.875]"),
    ] = None,
    question: Annotated[
        Prompted | None, typer.Option(help="Whether a benchmark's evictions see it. [both]")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy or pipeline of yours on a benchmark: module:object."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Part i/n of cells, or of a benchmark's contexts; default a launcher's."),
    ] = None,
    many: Annotated[
        int | None,
        typer.Option(min=1, help="Slots in which a benchmark's questions are asked, as they end."),
    ] = None,
) -> None:
    """Evaluate policies: accuracy and loss at equal cache sizes, as tables and plots.

    Exits with 1 where a cell failed; the next run with the same folder tries it again.
    """
    began = time.monotonic()
    with errors():
        from ..evaluation.grid.densities import density_variants
        from ..evaluation.grid.methods import method_variants
        from ..evaluation.grid.parts import folder_of, part_of
        from ..evaluation.grid.results import Store
        from ..evaluation.grid.runner import (
            Runner,
            absent_gates,
            given_for,
            variants_for,
        )
        from ..evaluation.grid.variants import own
        from ..evaluation.methods.left_out import left_out
        from ..evaluation.tasks.task import QUESTIONS
        from ..evaluation.texts import python_topics
        from ..selection import XAttention
        from ..store.fingerprint import pipeline_fingerprint

        keeps, budgets = keep or [0.25, 0.1], budget or [0.125, 0.25, 0.0625]
        check_number("minutes", minutes, "a number of at least 0", lambda x: x >= 0)
        check_fractions("keep", keeps)
        check_fractions("budget", budgets)
        duo = None if duo is None else shipped("duo", duo)
        of_benchmarks = {
            "data": data, "ratio": ratio, "question": question, "policy": policy, "many": many,
        }  # fmt: skip
        if benchmark is not None:
            refuse(benchmark, eager=eager, methods=methods, density=density, file=file)
            failed = run_benchmark(
                benchmark,
                model=model,
                out=out,
                deadline=began + 60 * minutes,
                tasks=task,
                lengths=length,
                starts=variant,
                contexts=contexts,
                questions=questions,
                texts=texts,
                gates=gate or [],
                thresholds=threshold or [],
                duo=duo,
                pipelines=pipeline or [],
                trust_code=trust_code,
                keeps=keeps,
                budgets=budgets if budget else [],
                window=window,
                page_size=page_size,
                seed=seed,
                device=device,
                dtype=dtype,
                progress=progress,
                data=data or [],
                ratios=ratio or RATIOS,
                question=question or Prompted.both,
                policies=policy or [],
                part=part,
                slots=many,
            )
            raise typer.Exit(int(failed))
        refuse(None, **of_benchmarks)
        if file and not methods:
            raise ValueError("file: wanted --methods, which measures it, got none")
        which = part_of(part)
        tasks = _tasks(task)
        contexts = contexts or 8
        if questions is not None:
            contexts = -(-questions // QUESTIONS)
        gates = [shipped("gate", file) for file in gate or []]
        if model == "smollm2" and not (gates or methods or density) and (absent := absent_gates()):
            typer.echo(
                f"left out, since they are not installed: {', '.join(absent)}; "
                "--gate NAME looks on the hub"
            )
        if density:
            check_fractions("density", density)
            if methods:
                raise ValueError("density: wanted without --methods, got both")
            found = density_variants(density, threshold or [XAttention().threshold], window)
        elif methods:
            given = given_for(model, gates, duo, file or [])
            found, reasons = method_variants(keeps, window, given), left_out(given)
            typer.echo("left out: " + "; ".join(f"{x} ({why})" for x, why in reasons.items()))
        else:
            found = variants_for(model, gates, threshold or [], duo, keeps, budgets, window)
        mine = {name: own_pipeline(name, trust_code) for name in pipeline or []}
        found = chosen([*found, *(own(*item) for item in mine.items())], variant)
        text = python_topics() if texts is None else "\n\n".join(read(texts))
        language_model, tokenizer = load(model, device, dtype)
        of = str(language_model.dtype).removeprefix("torch.")
        settings = {
            "model": model,
            "contexts": contexts,
            "text": hashlib.sha256(text.encode()).hexdigest()[:16],
            "seed": seed,
            "window": window,
            "dtype": of,
            "gate": [digest(file) for file in gates],
            "duo": None if duo is None else digest(duo / "full_attention_heads.tsv"),
            "keep": keeps,
            "threshold": threshold,
            "page_size": page_size,
        }
        if methods:
            settings["left_out"] = reasons
            settings["files"] = {name: digest(x) for name, x in given.files.items()}
        if density:
            settings["density"] = density
        if mine:
            settings["pipeline"] = {n: pipeline_fingerprint(x) for n, x in mine.items()}
        if which[1] > 1:
            settings["parts"] = which[1]
        store = Store(folder_of(out, which))
        runner = Runner(
            model=language_model,
            tokenizer=tokenizer,
            text=text,
            contexts=contexts,
            seed=seed,
            deadline=began + 60 * minutes,
            store=store,
            results=store.open(settings, made_with(language_model)),
            captured=not eager,
            page_size=page_size,
            part=which,
            say=typer.echo,
        )
        with Progress("cell", asked=progress) as shown:
            runner.starts = lambda cell, number, of: _doing(shown, cell, number, of)
            runner.run(tasks, length or [2048, 4096, 8192, 1024], found)
        _summarize(runner, out, f"{model}, {of}, {language_model.device.type}")
    if runner.failed:
        raise typer.Exit(1)


def _doing(shown: Progress, cell: Cell, number: int, of: int) -> None:
    if not number:
        shown.begin(of)
    shown.done(number, f"{cell.task.name}, {cell.length}: {cell.variant.name}")


def _tasks(names: Sequence[str] | None) -> list[Task]:
    """The tasks of these names, or those that are measured where none is named."""
    from ..evaluation.tasks import TASKS

    unknown = set(names or ()) - TASKS.keys()
    if unknown:
        raise ValueError(f"task: wanted {', '.join(TASKS)}; got {', '.join(sorted(unknown))}")
    return [TASKS[name] for name in names or TASKS if names or TASKS[name].default]


def _summarize(runner: Runner, out: Path, title: str) -> None:
    """Writes tables and plots of all parts that there are, and says how many cells."""
    from ..evaluation.grid.parts import found_parts
    from ..evaluation.grid.plots import plots
    from ..evaluation.grid.results import write_results
    from ..evaluation.grid.tables import summary

    record, found, missing = found_parts(out, runner.part[1])
    results = [result for part in found for result in part]
    write_results(out, record, results, summary(record, results, title))
    try:
        plots(out, results)
    except ModuleNotFoundError as error:
        typer.echo(f"no plots: {error}")
    failed = sum(bool(x.failed) for x in results)
    parts = f", {len(missing)} of {runner.part[1]} parts missing" if missing else ""
    done = f"{len(results) - failed} cells, {failed} failed, {runner.left} left"
    typer.echo(f"{out / 'results.md'}: {done}{parts}{GOES_ON if runner.left else ''}")
