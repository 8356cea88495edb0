"""`kvpolicy completion`: a script with which a shell completes commands, options and names.

The script holds the names itself: asking Python for them would take seconds a key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from .common import QWEN_CODER, SMOLLM2, of_kind
from .completion_scripts import Command, Option, Value, bash, fish, zsh


class Shell(StrEnum):
    """Shells that are served."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def script(shell: Shell, functions: Iterable[Callable[..., None]]) -> str:
    """What a shell reads; `functions` are the commands, whose signatures tell their options."""
    named = _named()
    known = {x.__name__.replace("_", "-"): command_of(x, named) for x in functions}
    return {Shell.bash: bash, Shell.zsh: zsh, Shell.fish: fish}[shell](known)


def command_of(function: Callable[..., None], named: Mapping[str, Value]) -> Command:
    """A command as a shell should know it; `named` are values by the names of arguments."""
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
    # Inside Annotated, typer takes its first argument, the default, for a name.
    first = [info.default] if isinstance(info.default, str) else []
    given = [*first, *(info.param_decls or ())]
    if given:
        return tuple(x for names in given for x in names.split("/"))
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
    from ..evaluation.benchmarks.registry import BENCHMARKS
    from ..evaluation.tasks import TASKS
    from ..pretrained import KNOWN, names

    known = sorted({*names(), *KNOWN})
    gates = tuple(x for x in known if of_kind("gate", x))
    patterns = tuple(x for x in known if of_kind("duo", x))
    return {
        "model": Value(words=(SMOLLM2, QWEN_CODER), folders=True, models=True),
        "gate": Value(words=gates, files=True),
        "duo": Value(words=patterns, folders=True),
        "benchmark": Value(words=tuple(BENCHMARKS), files=True),
        "task": Value(words=tuple(TASKS)),
        "names": Value(words=GROUPS),
        "device": Value(words=("cpu", "cuda")),
        "texts": Value(files=True),
        "slot": Value(words=("admission", "eviction")),
    }
