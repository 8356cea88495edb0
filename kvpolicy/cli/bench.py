"""`kvpolicy bench`: the kernels and whole models, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import errors


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Groups or parts of case names; default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("bench/out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, also without a GPU.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Time limit.")] = 540.0,
) -> None:
    """Measure the kernels and whole models on this machine."""
    from ..bench import run

    with errors():
        rows = run(names or [], out=str(out), quick=quick, seconds=seconds)
    if any(row.error for row in rows):
        raise typer.Exit(1)
