"""From a pipeline to plain values and to a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from .._arguments import check_path
from .._fields import shown
from .._files import write_text
from .._slots import SLOTS
from ..admission import DuoAttention
from ..pipeline import CachePipeline, is_pipeline
from ..store.fingerprint import pipeline_fingerprint
from . import text
from .names import BASES, PER_LAYER, name_of
from .read import FORMAT, pipeline_from
from .weights import duo_place, weights_of, weights_place


def save_pipeline(pipeline: CachePipeline, path: str | os.PathLike[str]) -> None:
    """Writes a pipeline to a `.json`, `.yaml` or `.yml` file, for `load_pipeline`.

    Every field is written, so that a default that changes later changes nothing. Weights are named
    by their file, relative to this one if they lie beside or below it, and the file's hash.

    Raises:
        ValueError: a value cannot stand in a file (a tensor, a class of `__main__`), a gate's
            weights come from no file, or a policy of yours does not take its own fields back.

    Example:
        `save_pipeline(CachePipeline(selection=Quest(budget=1024)), "quest.json")`
    """
    is_pipeline(pipeline)
    check_path("path", path)
    path = Path(path)
    text.check_suffix(path)
    write_text(path, text.dumps(data_of(pipeline, path.parent), path))


def data_of(pipeline: CachePipeline, folder: Path | None = None) -> dict[str, Any]:
    """A pipeline in terms of JSON; paths of weights below `folder` are relative to it.

    Raises ValueError as `save_pipeline` does.
    """
    writer = _Writer(folder)
    data: dict[str, Any] = {"format": FORMAT}
    data |= {name: writer.value(getattr(pipeline, name), name) for name in SLOTS}
    data |= {"window": pipeline.window, "backend": pipeline.backend}
    again = pipeline_from(data, folder, trust_code=True)
    if pipeline_fingerprint(again) != pipeline_fingerprint(pipeline):
        raise ValueError(
            "pipeline: a policy does not take back, as arguments, what its fields hold; wanted "
            "frozen attrs classes of plain values"
        )
    return data


@attrs.frozen
class _Writer:
    folder: Path | None

    def value(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{where}: wanted a finite number, got {value}")
            return value
        if isinstance(value, BASES):
            return self._policy(value, where)
        if isinstance(value, list | tuple):
            return [self.value(item, where) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            if "type" in value:
                raise ValueError(f'{where}: a file cannot hold a mapping with the key "type"')
            return {key: self.value(item, f"{where}.{key}") for key, item in value.items()}
        raise ValueError(
            f"{where}: wanted numbers, texts, lists, policies or budgets, got {shown(value)}, "
            "which a pipeline's file cannot hold; keep weights in a file of their own"
        )

    def _policy(self, value: Any, where: str) -> dict[str, Any]:
        try:
            name = name_of(type(value))
            place = self._place(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if name == PER_LAYER:
            return {"type": name, **self._per_layer(value, where)}
        held = weights_of(value)
        skipped = {"source", *held} if held or isinstance(value, DuoAttention) else set()
        if place is not None:
            skipped |= {"full_heads"}
        fields = {
            key: self.value(item, f"{where}.{key}")
            for key, item in _fields(value).items()
            if key not in skipped
        }
        return {"type": name, **(place or {}), **fields}

    def _place(self, value: Any) -> dict[str, Any] | None:
        """Where weights lie that the file does not hold."""
        if weights_of(value):
            return weights_place(value, self.folder)
        return duo_place(value, self.folder) if isinstance(value, DuoAttention) else None

    def _per_layer(self, value: Any, where: str) -> dict[str, Any]:
        layers = {
            _span(span): self.value(policy, f"{where}.layers") for span, policy in value.layers
        }
        return {"default": self.value(value.default, f"{where}.default"), "layers": layers}


def _span(span: range) -> str:
    if span.step == 1:
        return str(span.start) if len(span) == 1 else f"{span.start}:{span.stop}"
    return f"{span.start}:{span.stop}:{span.step}"


def _fields(value: Any) -> dict[str, Any]:
    """Arguments that make `value` again; a private one that says nothing is left out."""
    if not attrs.has(type(value)):
        return dict(vars(value))
    return {
        field.alias or field.name: getattr(value, field.name)
        for field in attrs.fields(type(value))
        if field.init and not (field.name.startswith("_") and getattr(value, field.name) is None)
    }
