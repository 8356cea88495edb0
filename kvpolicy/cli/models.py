"""`kvpolicy models`: which model types of the installed transformers are served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._elsewhere import near
from .common import errors


def models(
    types: Annotated[
        list[str] | None, typer.Argument(help="Values of model_type; default all.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Probe a tiny random model of each type; else only their names are listed.",
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Types at a time.")] = 1,
    seconds: Annotated[float, typer.Option(min=1.0, help="Time limit of a type.")] = 120.0,
    out: Annotated[
        Path | None, typer.Option(help="A markdown file for the table, such as docs/models.md.")
    ] = None,
) -> None:
    """Say which model types are served, or what is in the way; on a GPU also which are captured."""
    with errors():
        from ..adapters.hf.rule.document import document
        from ..adapters.hf.rule.support import check_types
        from ..adapters.hf.rule.tiny import causal_types, multimodal_types

        known = [*causal_types(), *multimodal_types()]
        wrong = sorted(set(types or ()) - set(known))
        if wrong:
            hint = near(wrong[0], known)
            raise ValueError(
                f"types: transformers has no language model of {', '.join(wrong)}{hint}"
            )
        if not check:
            for name in types or known:
                typer.echo(name)
            typer.echo("these are names only; --check says which types are served", err=True)
            return
        found = check_types(
            types or known,
            jobs=jobs,
            seconds=seconds,
            told=lambda x: typer.echo(f"{x.name}: {'served' if x.served else x.reason}", err=True),
        )
        text = document(found)
        if out is None:
            typer.echo(text)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")
    served = sum(x.served is True for x in found)
    typer.echo(f"{served} of {len(found)} types are served", err=True)
