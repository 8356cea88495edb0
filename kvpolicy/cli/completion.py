"""`kvpolicy completion`: a script with which a shell completes commands, options and names.

The script holds the names itself: asking Python for them would take seconds a key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import attrs
import typer

from .common import SMOLLM2, of_kind
from .completion_scripts import bash, fish, zsh


class Shell(StrEnum):
    """Shells that are served."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


@attrs.frozen(kw_only=True)
class Value:
    """What an option or argument takes: `words` to offer, and files, folders or models."""

    words: tuple[str, ...] = ()
    files: bool = False
    folders: bool = False
    models: bool = False


@attrs.frozen(kw_only=True)
class Option:
    """An option by its names, such as `("--report", "--no-report")`; no value: a switch."""

    names: tuple[str, ...]
    help: str
    value: Value | None


@attrs.frozen(kw_only=True)
class Command:
    """A command with its options and what its arguments take."""

    help: str
    options: tuple[Option, ...]
    argument: Value


def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell that reads the script.")],
) -> None:
    """Print a script with which a shell completes commands, options and names.

    Names are those of models, shipped gates and patterns, tasks and benchmarks.
    """
    scripts = {Shell.bash: bash, Shell.zsh: zsh, Shell.fish: fish}
    typer.echo(scripts[shell](commands()), nl=False)


def commands() -> dict[str, Command]:
    """All commands as a shell should know them, from their signatures."""
    from .commands import COMMANDS

    named = _named()
    return {x.__name__.replace("_", "-"): _command(x, named) for x in COMMANDS}


def _command(function: Callable[..., None], named: Mapping[str, Value]) -> Command:
    options, argument = [], Value()
    for name, hint in get_type_hints(function, include_extras=True).items():
        if name == "return":
            continue
        kind, info = get_args(hint)
        value = named.get(name) or _value(kind, info)
        if isinstance(info, typer.models.ArgumentInfo):
            # The first argument is what completes.
            argument = argument if argument != Value() else value
            continue
        switch = bool in (kind, *get_args(kind))
        options.append(
            Option(
                names=_names(name, info, switch),
                help=str(info.help or "").split(". ")[0],
                value=None if switch else value,
            )
        )
    options.append(Option(names=("--help",), help="Show help and exit.", value=None))
    said = (inspect.getdoc(function) or "").split("\n")[0]
    return Command(help=said, options=tuple(options), argument=argument)


def _names(name: str, info: typer.models.OptionInfo, switch: bool) -> tuple[str, ...]:
    """An option's names, as typer makes them."""
    if info.param_decls:
        return tuple(x for decl in info.param_decls for x in decl.split("/"))
    long = name.replace("_", "-")
    return (f"--{long}", f"--no-{long}") if switch else (f"--{long}",)


def _value(kind: Any, info: typer.models.ParameterInfo) -> Value:
    """By the type: choices, or paths."""
    kinds = [x for part in (kind, *get_args(kind)) for x in (part, *get_args(part))]
    for found in kinds:
        if isinstance(found, type) and issubclass(found, StrEnum):
            return Value(words=tuple(found))
    if Path in kinds:
        return Value(files=info.file_okay, folders=not info.file_okay)
    return Value()


def _named() -> dict[str, Value]:
    """By the name: what no type tells."""
    from ..bench import GROUPS
    from ..evaluation.tasks import TASKS
    from ..pretrained import names

    gates = tuple(x.removesuffix(".safetensors") for x in names() if of_kind("gate", x))
    patterns = tuple(x for x in names() if of_kind("duo", x))
    return {
        "model": Value(words=(SMOLLM2,), folders=True, models=True),
        "gate": Value(words=gates, files=True),
        "duo": Value(words=patterns, folders=True),
        "task": Value(words=tuple(TASKS)),
        "names": Value(words=GROUPS),
        "device": Value(words=("cpu", "cuda")),
        "texts": Value(files=True),
        "slot": Value(words=("admission", "eviction")),
    }
