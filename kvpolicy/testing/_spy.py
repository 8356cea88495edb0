"""Finding host syncs and NaN comparisons in code that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result, or its size, the host has to wait for.
_WAITING = {
    "_local_scalar_dense": "item(), bool(), int() or float() of a tensor",
    "is_nonzero": "bool() of a tensor",
    "nonzero": "nonzero()",
    "masked_select": "masked_select()",
    "_unique2": "unique()",
    "unique_dim": "unique()",
    "unique_consecutive": "unique_consecutive()",
    "equal": "torch.equal()",
}
# Methods that copy to the host, which on a CPU no operator shows.
_COPYING = ("cpu", "tolist", "numpy", "__array__")
_COMPARING = ("gt", "ge", "lt", "le", "eq", "ne", "sort", "topk", "argsort", "argmax", "argmin")


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.nans: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING:
            self.syncs.append(_WAITING[name])
        elif name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        ):
            self.syncs.append("indexing with a boolean mask (use torch.where)")
        elif name == "lift_fresh" and args[0].ndim:
            self.syncs.append("torch.tensor(list) (make it in `place`)")
        elif name == "repeat_interleave" and "output_size" not in (kwargs or {}):
            self.syncs.append("repeat_interleave() without output_size")
        if name in _COMPARING and any(
            isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any())
            for x in tree_leaves(args)
        ):
            self.nans.append(f"{name} of NaN")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, syncs: list[str]) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # A device object may be an input's own; a literal "cpu" is a copy to the host.
        to_host = name == "to" and "cpu" in (*args[1:2], kwargs.get("device"))
        if func is getattr(Tensor, name, None) and (name in _COPYING or to_host):
            self.syncs.append(f"{name}()")
        return func(*args, **kwargs)


@contextmanager
def watch() -> Iterator[_Operators]:
    """Collects what waits for the device (`syncs`) and comparisons that read NaN (`nans`)."""
    operators = _Operators()
    with _Methods(operators.syncs), operators:
        yield operators


def syncs(function: Callable[..., Any], *args: Any) -> list[str]:
    """What in `function(*args)` would make the host wait for a GPU."""
    with watch() as seen:
        function(*args)
    return sorted(set(seen.syncs))


def nan_comparisons(function: Callable[..., Any], *args: Any) -> list[str]:
    """Comparisons in `function(*args)` that read NaN."""
    with watch() as seen:
        function(*args)
    return sorted(set(seen.nans))
