"""The command `kvpolicy`: answers, plans of memory, training, evaluation, benchmarks."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .ablate import ablate
from .bench import bench
from .calibrate import calibrate, pareto
from .completion import Shell, script
from .evaluate import evaluate
from .examples import epilog
from .fit import fit_kvzap, fit_q_filters, fit_triattention
from .generate import chat, generate
from .inspect import inspect
from .models import models
from .plan import plan
from .reproduce import reproduce
from .train import train_duo, train_gate
from .warm import warm

app = typer.Typer(
    help="KV-cache admission, selection and eviction policies that compose and free real memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=epilog(""),
)


def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell that reads the script.")],
) -> None:
    """Print a script with which a shell completes commands, options and names.

    Names are those of models, shipped gates and patterns, tasks and benchmarks.
    """
    typer.echo(script(shell, COMMANDS), nl=False)


COMMANDS = (
    generate, chat, plan, inspect, calibrate, pareto, evaluate, train_gate, train_duo,
    fit_q_filters, fit_triattention, fit_kvzap, ablate, reproduce, bench, models, warm, completion,
)  # fmt: skip
for command in COMMANDS:
    app.command(epilog=epilog(command.__name__.replace("_", "-")))(command)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvpolicy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say it and exit."),
    ] = False,
) -> None:
    """What all commands share."""
