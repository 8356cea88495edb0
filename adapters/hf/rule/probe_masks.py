"""Which keys a query sees, by a model's own mask function and by the kind of its layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .kinds import LayerKind

MaskFunction = Callable[[Any, Any, Any, Any], Any]


def seen(query: Tensor, key: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Whether queries at positions `query` see keys at positions `key`; they broadcast."""
    found = key <= query
    if window is not None:
        found = found & (query - key < window)
    if chunk is not None:
        found = found & (query // chunk == key // chunk)
    return found


def positions(kinds: Iterable[LayerKind]) -> Tensor:
    """Positions at which masks of these windows and chunks, or of other sizes, show."""
    found = {0, 1, 2, 3} | {2**n + d for n in range(2, 20) for d in (-1, 0, 1)}
    for kind in kinds:
        for size in (x for x in (kind.window, kind.chunk) if x is not None):
            found |= {n * size + d for n in (1, 2, 3) for d in (-1, 0, 1)}
    return torch.tensor(sorted(found))


def difference(
    function: MaskFunction, kind: LayerKind, places: Tensor, length: int
) -> tuple[int, int, bool] | None:
    """The first query and key on which a mask function and a kind differ, and the function's word.

    A function that looks positions up, in tensors as long as the prompt, is asked about these only.
    """
    try:
        theirs = _ask(function, places)
    except IndexError:
        places = places[places < length]
        theirs = _ask(function, places)
    ours = seen(places[:, None], places, kind.window, kind.chunk).cpu()
    wrong = (theirs != ours).nonzero()
    if not len(wrong):
        return None
    row, column = wrong[0].tolist()
    return int(places[row]), int(places[column]), bool(theirs[row, column])


def _ask(function: MaskFunction, places: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long, device=places.device)
    with Bounded():  # type: ignore[no-untyped-call]
        answer = function(zero, zero, places[:, None], places[None])
    shape = (len(places), len(places))
    return torch.as_tensor(answer).cpu().expand(shape).bool()


class Bounded(TorchDispatchMode):
    """Lookups beyond a tensor's end raise IndexError; a GPU's own check breaks its context."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for dim, at in _lookups(func, args):
            size, (low, high) = args[0].shape[dim], (int(x) for x in at.aminmax())
            if high >= size or low < -size:
                raise IndexError(f"index: wanted below {size}, got {high if high >= size else low}")
        return func(*args, **(kwargs or {}))


def _lookups(func: Any, args: tuple[Any, ...]) -> list[tuple[int, Tensor]]:
    """Dims of the first argument that an operation looks up, and at which places."""
    if func in (torch.ops.aten.gather.default, torch.ops.aten.index_select.default):
        return [(args[1], args[2])]
    if func is not torch.ops.aten.index.Tensor:
        return []
    given = [(dim, at) for dim, at in enumerate(args[1]) if at is not None and at.numel()]
    # A mask of several dims shifts those after it; one that does not fit raises on the host.
    return [] if any(at.dtype == torch.bool for _, at in given) else given
