"""From a file and plain values to a pipeline."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from .._arguments import check_flag, check_path
from .._fields import shown
from ..per_layer import per_layer
from ..pipeline import CachePipeline
from . import text
from .names import named
from .weights import reader_of

FORMAT = 1  # of the files; another one is refused
_SPAN = re.compile(r"(\d+)(?::(-?\d+)(?::(-?\d+))?)?")


def load_pipeline(path: str | os.PathLike[str], *, trust_code: bool = False) -> CachePipeline:
    """The pipeline of a `.json`, `.yaml` or `.yml` file; its fingerprint is that of the one saved.

    Classes of kvpolicy are made by their names. Any other, `module:object`, is imported only with
    `trust_code=True`, and must be a policy or budget. Weights are read from the files that are
    named, relative to this one, if their hashes are those that stand here.

    Raises:
        FileNotFoundError: the file, or one of weights that it names, is not there.
        ValueError, TypeError: the file is damaged, names what is not known or not trusted, or a
            policy refuses a value; the message says where.

    Example:
        `load_pipeline("quest.json")`
    """
    check_path("path", path)
    check_flag("trust_code", trust_code)
    path = Path(path)
    data = text.read(path)
    try:
        return pipeline_from(data, path.parent, trust_code=trust_code)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def pipeline_from(
    data: Any, folder: Path | None = None, *, trust_code: bool = False
) -> CachePipeline:
    """The pipeline that plain values say, as `load_pipeline`; files' names start at `folder`."""
    given = _mapping(data, "pipeline")
    if (found := given.pop("format", FORMAT)) != FORMAT:
        raise ValueError(f"format: wanted {FORMAT}, got {shown(found)}")
    reader = _Reader(folder, trust_code)
    _check_names(CachePipeline, given, "")
    return CachePipeline(**{name: reader.value(item, name) for name, item in given.items()})


@attrs.frozen
class _Reader:
    folder: Path | None
    trust_code: bool

    def value(self, data: Any, where: str) -> Any:
        """`data` with the policies and budgets that it says; lists as tuples."""
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list | tuple):
            return tuple(self.value(item, where) for item in data)
        given = _mapping(data, where)
        if "type" not in given:
            return {key: self.value(item, f"{where}.{key}") for key, item in given.items()}
        try:
            make = named(given.pop("type"), self.trust_code)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        inside = {key: self._inside(make, key, item, where) for key, item in given.items()}
        return self._made(make, inside, where)

    def _inside(self, make: Callable[..., Any], key: str, item: Any, where: str) -> Any:
        if make is not per_layer or key != "layers":
            return self.value(item, f"{where}.{key}")
        layers = _mapping(item, f"{where}.layers")
        return {_span(k, where): self.value(v, f"{where}.layers.{k}") for k, v in layers.items()}

    def _made(self, make: Callable[..., Any], given: dict[str, Any], where: str) -> Any:
        reads = reader_of(make)
        try:
            if reads is not None:
                return reads(given, self.folder)
            _check_names(make, given, f"{where}.")
            return make(**given)
        except (FileNotFoundError, TypeError, ValueError) as error:
            told = str(error)
            told = told if told.startswith(f"{where}.") else f"{where}: {told}"
            raise type(error)(told) from error


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise TypeError(f"{where}: wanted names and values, got {shown(data)}; write {{...}}")
    for key in data:
        if not isinstance(key, str):
            raise TypeError(f"{where}: wanted texts as names, got {shown(key)}; write it in quotes")
    return dict(data)


def _span(key: str, where: str) -> range:
    """Layers as a file writes them: "3", "0:8" or "0:8:2", where Python's range would have them."""
    found = _SPAN.fullmatch(key)
    if found is None or found[3] == "0":
        raise ValueError(f'{where}.layers: wanted "3", "0:8" or "0:8:2", got {shown(key)}')
    first = int(found[1])
    return range(first, int(found[2] or first + 1), int(found[3] or 1))


def _check_names(make: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a name that is no field, and for a field that has to be there."""
    if not isinstance(make, type) or not attrs.has(make):
        return
    fields = {field.alias: field for field in attrs.fields(make) if field.init}
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f'; write "{near[0]}"' if near else ""
            wanted = ", ".join(fields) or "no fields"
            raise ValueError(f"{where}{name}: wanted {wanted} of {make.__name__}, got {name}{hint}")
    for name, field in fields.items():
        if field.default is attrs.NOTHING and name not in given:
            raise ValueError(f"{where}{name}: {make.__name__} has no default for it")
