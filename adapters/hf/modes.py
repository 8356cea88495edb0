"""Modes of torch that a cache must not depend on: inference mode, autocast, mixed dtypes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...errors import UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")


def ordinary(function: Callable[P, R]) -> Callable[P, R]:
    """`function` outside inference mode and without gradients.

    Tensors made in inference mode cannot be written to outside it. Where both are so already, as in
    `generate`, nothing is entered: a decoded token on a CPU pays for that in every layer.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
                return function(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        finally:
            del args, kwargs  # an error among them would hold itself by its traceback

    return run


def check_transforms() -> None:
    """Raises UnsupportedError inside what follows a forward's tensors through it."""
    tracing = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if tracing or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise UnsupportedError(
            "trace: an attached model cannot be traced or exported, since its cache is no part "
            "of a graph; detach it first, or compile its layers by attach(compile=True)"
        )
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "torch.func, forward_ad: an attached model serves inference only, and its cache is no "
            "part of a derivative or of vmap; detach it to transform it"
        )


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
