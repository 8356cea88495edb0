"""Modes of torch that a cache must not depend on: inference mode, autocast, mixed dtypes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def ordinary(function: Callable[P, R]) -> Callable[P, R]:
    """`function` outside inference mode and without gradients.

    Tensors made in inference mode cannot be written to outside it. Where both are so already, as in
    `generate`, nothing is entered: a decoded token on a CPU pays for that in every layer.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def exactly(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns autocast off, so that what a cache stores and reads is computed in its dtype."""
    return torch.autocast(device.type, enabled=False)


def in_dtype(x: Tensor, name: str, wanted: torch.dtype, *, chosen: bool) -> Tensor:
    """`x` in the dtype of a cache: where nothing is lost, or its user chose the dtype."""
    if not chosen and torch.promote_types(x.dtype, wanted) != wanted:
        raise TypeError(
            f"{name}: wanted {wanted}, in which the cache was made, got {x.dtype}; make the cache "
            f"in it by attach(..., dtype={x.dtype})"
        )
    return x.to(wanted)
