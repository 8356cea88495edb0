"""Weights of policies in files: where they lie and their hash, never values.

The hash is of the weights, not of the file's bytes, which differ where a copy is packed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from .. import pretrained
from ..admission import DuoAttention
from ..admission._duo_file import PATTERN
from ..admission._files import Source
from ..store.fingerprint import tensors_hash
from .names import KNOWN

HASH = "sha256"
# Names of a place: a shipped policy, a path, or a part of a hub repository.
_PLACE = ("pretrained", "file", "folder", "repo", "revision", HASH)
_CHOICE = ("sparsity", "threshold", "seed")  # what makes a pattern of DuoAttention's values


def weights_of(policy: Any) -> dict[str, Tensor]:
    """The tensors among a policy's fields; empty for one that `from_pretrained` does not read."""
    if not _reads_weights(type(policy)):
        return {}
    names = [field.name for field in attrs.fields(type(policy))]
    return {name: x for name in names if isinstance(x := getattr(policy, name), Tensor)}


def weights_place(policy: Any, beside: Path | None) -> dict[str, Any]:
    """Where a policy's weights lie, in place of them; paths start at the folder `beside`.

    Raises:
        ValueError: they come from no file, or are no longer those of their file.
    """
    kind: Any = type(policy)
    name, source = kind.__name__, policy.source
    again = f"write them by its save(path) and read them by {name}.from_pretrained(path)"
    if source is None:
        raise ValueError(f"source: {name}'s weights come from no file; {again}")
    needed = {x: getattr(policy, x) for x in _needed(kind) if x not in weights_of(policy)}
    held = kind.from_pretrained(source.path, **needed)
    if (found := _hash(policy)) != _hash(held):
        raise ValueError(f"source: the weights are no longer those of {source.path}; {again}")
    return _place(source, "file", beside) | {HASH: found}


def _read_weights(kind: Any, given: Mapping[str, Any], beside: Path | None) -> Any:
    """A policy whose weights `given` names; what it does not name is the file's own."""
    needed = {name: given[name] for name in _needed(kind) if name in given}
    policy = kind.from_pretrained(**_found("file", given, beside), **needed)
    _check_hash(_hash(policy), given)
    return attrs.evolve(policy, **_others(given, tuple(needed)))


def _reads_weights(kind: Any) -> bool:
    """Whether it is one of the library's policies whose weights stand in a file of their own."""
    return (
        kind in KNOWN.values()
        and hasattr(kind, "from_pretrained")
        and kind is not DuoAttention
        and "source" in attrs.fields_dict(kind)
    )


def _needed(kind: type) -> list[str]:
    return [x.name for x in attrs.fields(kind) if x.init and x.default is attrs.NOTHING]


def duo_place(duo: DuoAttention, beside: Path | None) -> dict[str, Any] | None:
    """Where a pattern's values lie and how it was made of them; None if it is from no folder."""
    if duo.source is None:
        return None
    chosen = dict(duo.source.chosen)
    made: DuoAttention = DuoAttention.from_pretrained(duo.source.path, **chosen)  # type: ignore[arg-type]
    if made.full_heads != duo.full_heads:
        return None
    return _place(duo.source, "folder", beside) | {HASH: _digest(duo.source.path)} | chosen


def read_duo(given: Mapping[str, Any], beside: Path | None) -> DuoAttention:
    """A pattern of the values that `given` names; what it does not name is the folder's own."""
    if "full_heads" in given:
        return DuoAttention(**given)
    chosen = {name: given[name] for name in _CHOICE if name in given}
    duo = DuoAttention.from_pretrained(**_found("folder", given, beside), **chosen)
    assert duo.source is not None
    _check_hash(_digest(duo.source.path), given)
    return attrs.evolve(duo, **_others(given, _CHOICE))


def reader_of(kind: Any) -> Callable[[Mapping[str, Any], Path | None], Any] | None:
    """What makes policies of a class whose weights lie elsewhere; None for all others."""
    if kind is DuoAttention:
        return read_duo
    return partial(_read_weights, kind) if _reads_weights(kind) else None


def _hash(policy: Any) -> str:
    return tensors_hash(weights_of(policy), {})


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / PATTERN).read_bytes()).hexdigest()


def _place(source: Source, kind: str, beside: Path | None) -> dict[str, Any]:
    if source.name is not None:
        return {"pretrained": source.name}
    if source.repo is not None:
        place = {"repo": source.repo, "file": source.file, "revision": source.revision}
        return {name: value for name, value in place.items() if value is not None}
    path = source.path
    if beside is not None and path.is_relative_to(beside.resolve()):
        path = path.relative_to(beside.resolve())
    return {kind: path.as_posix()}


def _found(kind: str, given: Mapping[str, Any], beside: Path | None) -> dict[str, Any]:
    """The arguments by which `from_pretrained` reads what `given` names."""
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
        return of | ({"file": given.get("file")} if kind == "file" else {})
    if "pretrained" in given:
        return {"path_or_repo": pretrained.path(given["pretrained"])}
    return {"path_or_repo": Path(os.path.join(beside or Path(), given[kind]))}


def _check_hash(found: str, given: Mapping[str, Any]) -> None:
    if given.get(HASH) != found:
        raise ValueError(
            f'{HASH}: wanted "{found}", which is that of the weights there, got {given.get(HASH)!r}'
        )


def _others(given: Mapping[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _PLACE + but}
