"""Completion scripts of shells, from tables of commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

import attrs


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


# Ids of the models in the hub's cache.
_CACHED = (
    'ls "${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}" 2>/dev/null '
    "| sed -n 's/^models--//p' | sed 's/--/\\//'"
)
_BASH = """\
_kvpolicy() {{
    local cur=${{COMP_WORDS[COMP_CWORD]//\\\\/}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}
    local command=${{COMP_WORDS[1]}} IFS=$'\\n' words="" paths=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "$command $prev" in
{values}
        *)
            case "$command $cur" in
{rest}
            esac
            ;;
        esac
    fi
    COMPREPLY=($(compgen $paths -W "$words" -- "$cur"))
}}
complete -o filenames -F _kvpolicy kvpolicy
"""


def bash(commands: Mapping[str, Command]) -> str:
    """For bash."""
    values, rest = [], []
    for name, command in commands.items():
        for option in command.options:
            if option.value is not None:
                cases = "|".join(shlex.quote(f"{name} {x}") for x in option.names)
                values.append(f"        {cases}) {_reply(option.value)} ;;")
        options = [x for option in command.options for x in option.names]
        rest.append(f"            '{name} -'*) words={_lines(options)} ;;")
        rest.append(f"            '{name} '*) {_reply(command.argument)} ;;")
    return _BASH.format(
        commands=_lines([*commands, "--help", "--version"]),
        values="\n".join(values),
        rest="\n".join(rest),
    )


def zsh(commands: Mapping[str, Command]) -> str:
    """For zsh, which reads bash's."""
    head = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    return head + bash(commands)


def fish(commands: Mapping[str, Command]) -> str:
    """For fish."""
    lines = ["complete -c kvpolicy -f", f"complete -c kvpolicy {_NONE} -l help -d 'Show help'"]
    lines.append(f"complete -c kvpolicy {_NONE} -l version -d 'Show the version'")
    for name, command in commands.items():
        on = f"-n '__fish_seen_subcommand_from {name}'"
        lines.append(f"complete -c kvpolicy {_NONE} -a {name} -d {_quoted(command.help)}")
        if command.argument.words or command.argument.files or command.argument.folders:
            lines.append(f"complete -c kvpolicy {on}{_fish(command.argument, '')}")
        for option in command.options:
            takes = "" if option.value is None else _fish(option.value, " -x")
            for long in option.names:
                said = f"-l {long.removeprefix('--')} -d {_quoted(option.help)}"
                lines.append(f"complete -c kvpolicy {on} {said}{takes}")
    return "\n".join(lines) + "\n"


_NONE = "-n __fish_use_subcommand"


def _reply(value: Value) -> str:
    """Bash's lines that offer a value."""
    words = _lines(value.words)
    if value.models:
        words += f"$'\\n'$({_CACHED})"
    paths = "-f" if value.files else "-d" if value.folders else ""
    return f"words={words} paths={paths}"


def _lines(words: Iterable[str]) -> str:
    """A bash word of lines; names hold spaces, but no quotes."""
    return "$'" + "\\n".join(words) + "'"


def _fish(value: Value, alone: str) -> str:
    words = " ".join(shlex.quote(word) for word in value.words)
    if value.models:
        words += f" ({_CACHED_FISH})"
    if value.folders:
        words += " (__fish_complete_directories)"
    given = f" -a {_quoted(words.strip())}" if words else ""
    return (" -r -F" if value.files else alone) + given


_CACHED_FISH = (
    "ls ~/.cache/huggingface/hub 2>/dev/null | string replace -rf '^models--(.*?)--' '$1/'"
)


def _quoted(text: str) -> str:
    """A fish word: single quotes and backslashes are escaped."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
