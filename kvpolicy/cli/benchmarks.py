"""`kvpolicy evaluate --benchmark`: published benchmarks, in parts and merged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .common import GOES_ON, check_fractions, load, read, shipped
from .own import own_pipeline, own_policy
from .progress import Progress
from .record import chosen, digest, made_with

if TYPE_CHECKING:
    from ..evaluation.benchmarks.runner import Cell
    from ..evaluation.grid.variants import Variant

BENCHMARK_CONTEXTS, BENCHMARK_QUESTIONS = 25, 200
RATIOS = [0.25, 0.5, 0.75, 0.875]
_LENGTHS = [4096]


class Prompted(StrEnum):
    """Whether the prompt that evictions compress has the question."""

    unseen = "unseen"
    seen = "seen"
    both = "both"


def refuse(benchmark: str | None, **options: object) -> None:
    """Raises a ValueError for an option that was given and that only the other kind of run has."""
    for name, value in options.items():
        if value:
            which = "without" if benchmark is not None else "with"
            raise ValueError(f"{name}: wanted {which} --benchmark, got {value!r}")


def run_benchmark(
    benchmark: str,
    *,
    model: str,
    out: Path,
    deadline: float,
    tasks: Sequence[str] | None,
    lengths: Sequence[int] | None,
    starts: Sequence[str] | None,
    contexts: int | None,
    questions: int | None,
    texts: Path | None,
    gates: Sequence[Path],
    thresholds: Sequence[float],
    duo: Path | None,
    pipelines: Sequence[str],
    trust_code: bool,
    keeps: Sequence[float],
    budgets: Sequence[float],
    window: int,
    page_size: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    progress: bool | None,
    data: Sequence[Path],
    ratios: Sequence[float],
    question: Prompted,
    policies: Sequence[str],
    part: str | None,
    slots: int | None,
) -> bool:
    """Measures a part of a benchmark, merges what parts there are, and says whether cells failed.

    Raises:
        ValueError: an unknown benchmark or task, or an argument that does not do.
    """
    from ..evaluation.benchmarks.evictions import evictions
    from ..evaluation.benchmarks.registry import benchmark_of
    from ..evaluation.benchmarks.runner import BenchmarkRunner
    from ..evaluation.grid.parts import folder_of, part_of
    from ..evaluation.grid.results import Store
    from ..evaluation.grid.runner import gates_for, variants_for
    from ..evaluation.grid.variants import own
    from ..evaluation.texts import python_topics
    from ..store.fingerprint import pipeline_fingerprint

    mine = benchmark_of(benchmark)
    asked = mine.chosen(tasks, data)
    which = part_of(part)
    check_fractions("ratio", ratios)
    if any(x == 1 for x in ratios):
        raise ValueError(
            f"ratio: wanted less than 1, the part of the context that is evicted, got {ratios}"
        )
    if questions is None:
        questions = BENCHMARK_QUESTIONS if contexts is None else 0
    contexts = contexts or BENCHMARK_CONTEXTS
    files = [shipped("gate", file) for file in gates]
    named = gates_for(model, files, thresholds)
    found = variants_for(model, files, thresholds, duo, keeps, budgets, window)
    seen = [x for x in ("unseen", "seen") if question in (x, Prompted.both)]
    known = {x.name for x in found}
    found += [x for x in evictions(named, ratios, seen) if x.name not in known]
    extra = {name: own_pipeline(name, trust_code) for name in pipelines}
    extra |= {name: own_policy(name, window) for name in policies}
    found = chosen([*_of(found, seen), *(own(*item) for item in extra.items())], starts)
    text = python_topics() if texts is None else "\n\n".join(read(texts))
    language_model, tokenizer = load(model, device, dtype)
    positions = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
    if lengths is None and not mine.generated and positions is None:
        raise ValueError("length: wanted the tokens to which contexts are cut, got none")
    whole: list[int] = _LENGTHS if mine.generated or positions is None else [positions]
    sizes = list(lengths or whole)
    if positions is not None and max(sizes) > positions:
        raise ValueError(f"length: wanted at most the model's {positions} positions, got {sizes}")
    of = str(language_model.dtype).removeprefix("torch.")
    settings = {
        "benchmark": benchmark,
        "model": model,
        "contexts": contexts,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16] if mine.generated else None,
        "data": [str(x) for x in data],
        "seed": seed,
        "window": window,
        "dtype": of,
        "gate": [digest(file) for file in files],
        "duo": None if duo is None else digest(duo / "full_attention_heads.tsv"),
        "keep": list(keeps),
        "threshold": list(thresholds) or None,
        "page_size": page_size,
        "parts": which[1],
        "pipeline": {n: pipeline_fingerprint(x) for n, x in extra.items()},
    }
    if questions:
        settings["questions"] = questions
    if slots is not None:
        settings["many"] = slots
    store = Store(folder_of(out, which))
    runner = BenchmarkRunner(
        model=language_model,
        tokenizer=tokenizer,
        benchmark=mine,
        text=text,
        contexts=contexts,
        questions=questions,
        seed=seed,
        deadline=deadline,
        store=store,
        results=store.open(settings, made_with(language_model)),
        data=tuple(data),
        part=which,
        slots=slots,
        page_size=page_size,
        say=typer.echo,
    )
    with Progress("cell", asked=progress) as shown:
        runner.starts = lambda cell, number, count: _doing(shown, cell, number, count)
        runner.run(asked, sizes, found)
    title = f"{benchmark}: {model}, {of}, {language_model.device.type}"
    return _finish(runner.left, out, which, title, benchmark) or bool(runner.failed)


def _of(found: Sequence[Variant], seen: Sequence[str]) -> list[Variant]:
    """Variants that compress the prompts that are asked for."""
    from ..evaluation.grid.variants import SEEN

    kept = [x for x in found if "seen" in seen or SEEN not in x.family]
    return [x for x in kept if "unseen" in seen or x.question_in_prompt or SEEN in x.family]


def _finish(left: int, out: Path, which: tuple[int, int], title: str, name: str) -> bool:
    """Writes tables and the plot of all parts that there are; whether a merged cell failed."""
    from ..evaluation.benchmarks.parts import merged
    from ..evaluation.benchmarks.plots import plot
    from ..evaluation.benchmarks.tables import summary
    from ..evaluation.grid.results import write_results

    record, results, missing = merged(out, which[1])
    write_results(out, record, results, summary(record, results, title))
    try:
        plot(out, results, name)
    except ModuleNotFoundError as error:
        typer.echo(f"no plot: {error}")
    failed = [x for x in results if x.failed]
    parts = f", {len(missing)} of {which[1]} parts missing" if missing else ""
    done = len(results) - len(failed)
    counts = f"{done} cells, {len(failed)} failed, {left} left{parts}"
    typer.echo(f"{out / 'results.md'}: {counts}{GOES_ON if left else ''}")
    # Cells that other parts have not reached yet are no failure of this one.
    return which[1] == 1 and bool(failed)


def _doing(shown: Progress, cell: Cell, number: int, count: int) -> None:
    if not number:
        shown.begin(count)
    shown.done(number, f"{cell.task}, {cell.length}: {cell.variant.name}")
