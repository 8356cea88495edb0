"""Names for contents: of pipelines, and of named tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor


def pipeline_fingerprint(pipeline: Any) -> str:
    """A hash of the policies' classes, parameters and tensors, and of the window.

    The backend is left out: all backends store the same. A policy's code is not hashed.
    """
    parts = (pipeline.admission, pipeline.selection, pipeline.eviction, pipeline.window)
    return hashlib.sha256(json.dumps([_described(part) for part in parts]).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, and over the header."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def _described(value: Any) -> Any:
    """`value` in terms of JSON; tensors by their hash, objects by class and fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return ["tensor", tensors_hash({"": value}, {})]
    if isinstance(value, list | tuple | range):
        return [_described(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_described(item)) for item in value)
    if isinstance(value, Mapping):
        return [[_described(key), _described(item)] for key, item in value.items()]
    if attrs.has(type(value)):
        # A field that came later says what was done before it: files of that time still fit.
        fields = {
            a.name: getattr(value, a.name)
            for a in attrs.fields(type(value))
            if a.metadata.get("fingerprint", True)
            and ("before" not in a.metadata or getattr(value, a.name) != a.metadata["before"])
        }
    elif hasattr(value, "__dict__") and not callable(value):
        fields = vars(value)
    elif isinstance(value, torch.dtype | torch.device):
        return str(value)
    else:
        raise TypeError(
            f"pipeline: a {type(value).__name__} among the policies' fields has no fingerprint; "
            "wanted numbers, strings, tensors, collections or attrs classes of these"
        )
    return [type(value).__qualname__, {name: _described(item) for name, item in fields.items()}]
