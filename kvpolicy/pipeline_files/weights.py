"""Weights of policies in files: where they lie and the hash of what lies there, never values."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from .. import pretrained
from ..admission import Admission, DuoAttention, WriteGate
from ..admission._duo_file import CONFIG, PATTERN
from ..admission._files import Source, find_file, find_folder
from ..admission.write_gate import WEIGHTS
from ..store.fingerprint import tensors_hash

HASH = "sha256"
# Names of a place: a shipped policy, a path, or a part of a hub repository.
_PLACE = ("pretrained", "file", "folder", "repo", "revision", HASH)
_CHOICE = ("sparsity", "threshold", "seed")  # what makes a pattern of DuoAttention's values


def gate_place(gate: WriteGate, beside: Path | None) -> dict[str, Any]:
    """Where a gate's weights lie, in place of them; paths start at the folder `beside`.

    Raises:
        ValueError: they come from no file, or are no longer those of their file.
    """
    again = "write them by gate.save(path) and read them by WriteGate.from_pretrained(path)"
    if gate.source is None:
        raise ValueError(f"source: WriteGate's weights come from no file; {again}")
    held = WriteGate.from_pretrained(gate.source.path)
    if _hash(held) != _hash(gate):
        raise ValueError(f"source: the weights are no longer those of {gate.source.path}; {again}")
    return _place(gate.source, "file", gate.source.path, beside)


def read_gate(given: Mapping[str, Any], beside: Path | None) -> WriteGate:
    """A gate whose weights `given` names; what it does not name is the file's own."""
    path, where = _found("file", given, beside)
    _check_hash(path, given)
    gate = WriteGate.from_pretrained(**where)
    return attrs.evolve(gate, **_others(given))


def duo_place(duo: DuoAttention, beside: Path | None) -> dict[str, Any] | None:
    """Where a pattern's values lie and how it was made of them; None if it is from no folder."""
    if duo.source is None:
        return None
    chosen = dict(duo.source.chosen)
    made: DuoAttention = DuoAttention.from_pretrained(duo.source.path, **chosen)  # type: ignore[arg-type]
    if made.full_heads != duo.full_heads:
        return None
    return _place(duo.source, "folder", duo.source.path / PATTERN, beside) | chosen


def read_duo(given: Mapping[str, Any], beside: Path | None) -> DuoAttention:
    """A pattern of the values that `given` names; what it does not name is the folder's own."""
    if "full_heads" in given:
        return DuoAttention(**given)
    path, where = _found("folder", given, beside)
    _check_hash(path / PATTERN, given)
    chosen = {name: given[name] for name in _CHOICE if name in given}
    duo = DuoAttention.from_pretrained(**where, **chosen)
    return attrs.evolve(duo, **_others(given, _CHOICE))


READERS: dict[type, Callable[[Mapping[str, Any], Path | None], Admission]] = {
    WriteGate: read_gate,
    DuoAttention: read_duo,
}


def _hash(gate: WriteGate) -> str:
    return tensors_hash({name: getattr(gate, name) for name in WEIGHTS}, {})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(source: Source, kind: str, hashed: Path, beside: Path | None) -> dict[str, Any]:
    digest = {HASH: _digest(hashed)}
    if source.repo is not None:
        place = {"repo": source.repo, "file": source.file, "revision": source.revision}
        return {name: value for name, value in place.items() if value is not None} | digest
    shipped = source.path.name
    if shipped in pretrained.names() and pretrained.path(shipped).resolve() == source.path:
        return {"pretrained": shipped} | digest
    path = source.path
    if beside is not None and path.is_relative_to(beside.resolve()):
        path = path.relative_to(beside.resolve())
    return {kind: path.as_posix()} | digest


def _found(kind: str, given: Mapping[str, Any], beside: Path | None) -> tuple[Path, dict[str, Any]]:
    """The path of what `given` names, and the arguments by which `from_pretrained` reads it."""
    places = [name for name in ("pretrained", "repo", kind) if name in given]
    if len(places) != 1 and places != ["repo", "file"]:
        raise ValueError(
            f'{kind}: wanted one of "{kind}", "pretrained" or "repo", got '
            f"{' and '.join(places) or 'none'}; weights are named by their file, never given"
        )
    for name in _PLACE:
        if not isinstance(given.get(name, ""), str):
            raise TypeError(f"{name}: wanted a text, got {given[name]!r}")
    if "repo" in given:
        of = {"path_or_repo": given["repo"], "revision": given.get("revision")}
        if kind == "file":
            path = find_file(given["repo"], given.get("file"), given.get("revision"))
            return path, of | {"file": given.get("file")}
        return find_folder(given["repo"], (PATTERN, CONFIG), given.get("revision")), of
    if "pretrained" in given:
        path = pretrained.path(given["pretrained"])
    else:
        path = Path(os.path.join(beside or Path(), given[kind]))
    return path, {"path_or_repo": path}


def _check_hash(path: Path, given: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found = _digest(path)
    if given.get(HASH) != found:
        raise ValueError(
            f'{HASH}: wanted "{found}", which is that of {path.name}, got {given.get(HASH)!r}'
        )


def _others(given: Mapping[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _PLACE + but}
