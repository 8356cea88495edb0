"""`kvpolicy reproduce`: a paper's figures on your machine, beside the published ones."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .._fields import check_number
from .common import Device, OfWeights, errors, load, read, shipped

UNMEASURED = (
    "Not measured by this project: neither the published gates nor HELMET and AIME25 with them. "
    "What this command writes is yours; docs/gates.md says what was measured by whom."
)


class Paper(StrEnum):
    """Papers whose figures are here."""

    wgkv = "wg-kv"


class Figure(StrEnum):
    """Figures of WG-KV (arXiv 2512.17452)."""

    fig7 = "fig7"
    fig8 = "fig8"
    fig9 = "fig9"
    fig10 = "fig10"


def reproduce(
    paper: Annotated[Paper, typer.Argument(help="Whose figure: wg-kv (arXiv 2512.17452).")],
    figure: Annotated[
        Figure,
        typer.Argument(help="fig7 HELMET, fig8 time and bytes, fig9 with Quest, fig10 AIME25."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the figure; a run goes on.", file_okay=False)
    ] = Path("reproduce/out"),
    model: Annotated[str | None, typer.Option(help="Default the paper's.")] = None,
    checkpoints: Annotated[
        str, typer.Option(help="Hub repository or folder of the gates' files.")
    ] = "WG-KV/checkpoints",
    data: Annotated[
        list[Path] | None, typer.Option(help="HELMET's files, or aime25.jsonl.", exists=True)
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="A long .txt file, or a folder of them, to time, for fig8.", exists=True),
    ] = None,
    duo: Annotated[Path | None, typer.Option(help="DuoAttention's pattern, for fig7.")] = None,
    contexts: Annotated[int | None, typer.Option(min=1, help="Contexts of a task. [100]")] = None,
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 60.0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model's layers, for fig8.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny random model and made-up files, offline.")
    ] = False,
    device: Device = None,
    dtype: OfWeights = None,
) -> None:
    """Measure a figure of WG-KV with its published gates, and set it beside the paper's.

    Exits with 1 where cells are left or failed; the next run with the same folder goes on.
    """  # fmt: skip
    began = time.monotonic()
    with errors():
        import attrs

        from ..evaluation.reproduce import published, quality
        from ..evaluation.reproduce.setup import TINY, Setup, Sizes, gates_of
        from ..evaluation.reproduce.system import system
        from .record import made_with

        check_number("minutes", minutes, "a number of at least 0", lambda x: x >= 0)
        name = model or (published.THINKING if figure == Figure.fig10 else published.LLAMA)
        files = tuple(data or ())
        if not quick and not files and figure in (Figure.fig7, Figure.fig9):
            raise ValueError(f"data: wanted HELMET's released jsonl files for {figure}, got none")
        if not quick and texts is None and figure == Figure.fig8:
            raise ValueError("texts: wanted a long text for fig8, got none")
        sizes, gate = Sizes(), gates_of(checkpoints, name)
        if quick:
            from ..evaluation.models import tiny_llama, tiny_tokenizer
            from ..evaluation.reproduce.tiny import tiny_data, tiny_gate

            name, sizes, gate = "a tiny random Llama", TINY, tiny_gate
            helmet, aime = tiny_data(out / "data")
            files = (aime,) if figure == Figure.fig10 else (helmet,)
            language_model: Any = tiny_llama()
            tokenizer: Any = tiny_tokenizer()
        else:
            language_model, tokenizer = load(name, device, dtype)
        if contexts is not None:
            sizes = attrs.evolve(sizes, contexts=contexts)
        home = out / figure
        setup = Setup(
            model=language_model,
            tokenizer=tokenizer,
            gate=gate,
            out=home,
            deadline=began + 60 * minutes,
            sizes=sizes,
            made_with=made_with(language_model),
            settings={
                "figure": figure.value,
                "model": name,
                "checkpoints": checkpoints,
                "contexts": sizes.contexts,
                "dtype": str(language_model.dtype).removeprefix("torch."),
                "data": [str(x) for x in files],
                "compiled": compiled,
            },
            text="a cache of keys. " * 16 if texts is None else "\n\n".join(read(texts)),
            data=files,
            duo=None if duo is None else shipped("duo", duo),
            compiled=compiled,
            say=typer.echo,
        )
        runs = {
            Figure.fig7: quality.accuracy,
            Figure.fig8: system,
            Figure.fig9: quality.selection,
            Figure.fig10: quality.reasoning,
        }
        charts, left = runs[figure](setup)
        where = f"{name}, {setup.settings['dtype']}, {setup.made_with['device']}"
        for number, chart in enumerate(charts, 1):
            noted = (*chart.notes, f"Ours: {where}.", UNMEASURED)
            whole = attrs.evolve(chart, notes=noted)
            label = figure.value if len(charts) == 1 else f"{figure.value}-{number}"
            written = whole.write(home, label)
            typer.echo(f"{', '.join(str(x) for x in written)}")
        typer.echo(UNMEASURED)
        if left:
            typer.echo(f"{left} measurements left or failed; the same command goes on")
    if left:
        raise typer.Exit(1)
