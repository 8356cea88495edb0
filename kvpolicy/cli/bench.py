"""`kvpolicy bench`: the kernels and whole models, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import errors
from .progress import Asked, Progress


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Groups or parts of case names; default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("bench/out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, also without a GPU.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Time limit.")] = 540.0,
    tp: Annotated[
        int,
        typer.Option(min=1, help="GPUs that share the heads of the models of model and profile."),
    ] = 1,
    progress: Asked = None,
) -> None:
    """Measure the kernels and whole models on this machine."""
    from ..bench import run
    from ..bench.ranks import check_devices, end, launch, started, together

    if tp > 1 and not started():
        with errors():
            check_devices(tp, quick)
        options = ["--out", str(out), "--seconds", str(seconds), "--tp", str(tp)]
        raise typer.Exit(launch(tp, [*(names or []), *options, *["--quick"] * quick]))
    if tp > 1:
        with errors(), together() as rank:
            rows = run(names or [], out=str(out), quick=quick, seconds=seconds, rank=rank, ranks=tp)
        end(failed=rank == 0 and any(row.error for row in rows))
    with errors(), Progress("benchmark", asked=progress) as shown:

        def starts(title: str, number: int, of: int) -> None:
            if not number:
                shown.begin(of)
            shown.done(number, title)

        rows = run(names or [], out=str(out), quick=quick, seconds=seconds, starts=starts)
    if any(row.error for row in rows):
        raise typer.Exit(1)
