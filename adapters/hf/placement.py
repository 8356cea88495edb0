"""In which dtype and on which device the attention of a layer computes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def dtype_of(module: Any, layer: nn.Module, config: Any) -> torch.dtype:
    """The dtype of what the key and value projections put out.

    Quantised projections hold bits, and put out the dtype that comes in: that of the layer's norms.
    """
    found: list[Any] = [getattr(p, "weight", None) for p in _projections(module)]
    if not all(isinstance(x, Tensor) and _computes(x) for x in found):
        found = [p for p in layer.parameters() if p.ndim == 1 and _computes(p)][:1]
    if not found:
        return getattr(config, "dtype", None) or torch.get_default_dtype()
    widest: torch.dtype = functools.reduce(torch.promote_types, [x.dtype for x in found])
    return widest


def _projections(module: Any) -> list[Any]:
    """The submodules that put out keys and values, as far as their names tell; else all."""
    named = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    found = [x for x in named if isinstance(x, nn.Module)]
    return found or [x for x in module.children() if list(x.parameters()) + list(x.buffers())]


def _computes(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def device_at(model: nn.Module, place: int, otherwise: torch.device) -> torch.device:
    """Where what a model's layer number `place` has of its own attention runs, or `otherwise`."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == place and any(True for _ in module.parameters()):
            return device_of(module, module)
    return otherwise


def device_of(module: Any, layer: nn.Module) -> torch.device:
    """Where the key projection runs, which weights that accelerate moves there may not say."""
    projections = _projections(module)
    for part in (*projections[:1], module, layer):
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    tensors: Iterator[Tensor] = itertools.chain(
        *(x for p in projections[:1] for x in (p.parameters(), p.buffers())),
        layer.parameters(),
        layer.buffers(),
    )
    return next(tensors).device
