"""Our mask function: it makes no mask, and sees what a mask would have said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..._fields import shown
from ...errors import UnsupportedError
from .faces import NAME

# The second is of cross attention: a probe refuses a model whose own tokens see later ones.
_PLAIN = (causal_mask_function, bidirectional_mask_function)
_PAIRS = 2**20  # of columns of a forward
# Of this thread. `padding`: the mask of the last call, for a decoder given only masks; unset where
# none was made since the last forward. `read`: what the forward in flight opened with.
_LAST = threading.local()


def no_mask(
    *args: Any,
    q_length: int = 1,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """The registered mask function: padding is read from the 2D mask by the decoder's hook.

    Raises UnsupportedError where tokens would see later ones, as within an image, and for a mask
    that the hook did not see.
    """
    _LAST.padding = attention_mask
    if torch.compiler.is_compiling():
        return
    if mask_function is not bidirectional_mask_function:
        _check_read(attention_mask)
    if q_length == 1 or mask_function in _PLAIN or _capturing():
        return
    device = kwargs.get("device") or getattr(attention_mask, "device", "cpu")
    if _sees_later(mask_function, kwargs.get("batch_size", 1), q_length, q_offset, device):
        raise UnsupportedError(
            "attention_mask: tokens would see later ones (those of one image, or of a text read in "
            "both directions), which caches do not hold"
        )


def _sees_later(
    function: Callable[..., Any], batch: int, columns: int, offset: int | Tensor, device: Any
) -> bool:
    """Whether a mask function shows one of the new columns a later one.

    Up to `_PAIRS` pairs are all looked at; of more, those whose distance is a power of two, and the
    blocks that see themselves whole. The host waits for the device once.
    """
    row = torch.arange(batch, device=device)[:, None, None]
    now = torch.arange(columns, device=device) + offset
    if batch * columns**2 <= _PAIRS:
        shown = function(row, torch.zeros_like(row), now[:, None], now)
        return isinstance(shown, Tensor) and bool((shown & (now > now[:, None])).any())
    row = row[..., 0]
    fars = [2**n for n in range((columns - 1).bit_length())]
    shown = [function(row, torch.zeros_like(row), now[:-n], now[n:]) for n in fars]
    found = [x.any() for x in shown if isinstance(x, Tensor)]
    blocks = _blocks_of(function)
    if blocks is not None:
        new = blocks[:, now].sort(dim=1).values
        found.append(((new[:, 1:] == new[:, :-1]) & (new[:, 1:] >= 0)).any())
    return bool(found) and bool(torch.stack(found).any())


def _blocks_of(function: Any) -> Tensor | None:
    """The block `[B, columns]` of each column, in a mask function made of transformers' parts."""
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if getattr(function, "__qualname__", "").startswith("blockwise_overlay"):
        return next((part for part in parts if isinstance(part, Tensor)), None)
    inner = [f for part in parts for f in (part if isinstance(part, tuple) else (part,))]
    found = (_blocks_of(f) for f in inner if callable(f))
    return next((blocks for blocks in found if blocks is not None), None)


def _check_read(mask: Tensor | None) -> None:
    """Raises UnsupportedError for a mask other than the forward in flight opened with."""
    read = getattr(_LAST, "read", mask)
    if read is mask:
        return
    if _capturing():
        return  # a mask of ones that the decoder makes itself
    if read is None or mask is None:  # one of ones says what none says
        one: Any = mask if read is None else read
        same = bool(one.all())
    else:
        same = read.shape == mask.shape and bool((read.bool() == mask.to(read.device)).all())
    if not same:
        raise UnsupportedError(
            "attention_mask: the decoder got another mask than its attachment read; what sets it "
            "(a hook or a wrapper of forward) must run before: install it, then attach"
        )


def _capturing() -> bool:
    """Whether a graph is being made, before which the same was looked at eagerly."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def opened(mask: Any) -> None:
    """Says that the decoder's forward goes on with `mask`."""
    _LAST.read = mask


def closed() -> None:
    """Forgets what the last forward saw."""
    for name in ("padding", "read"):
        _LAST.__dict__.pop(name, None)


def padding_of(mask: Any) -> Any:
    """The 2D mask of a decoder's forward, None where it has none.

    Wrappers around a decoder make its masks beforehand, one for each kind of layer: then it is what
    our mask function was given. Raises UnsupportedError for masks that it did not make, and as
    `check_mask` does.
    """
    made, padding = hasattr(_LAST, "padding"), getattr(_LAST, "padding", None)
    closed()
    if not isinstance(mask, dict):
        padding = mask
    elif (custom := [name for name, x in mask.items() if x is not None]) or not made or not mask:
        which = ", ".join(custom or map(str, mask)) or "none"
        raise UnsupportedError(
            f"attention_mask: wanted a 2D mask of real tokens [B, columns]; masks by kind of layer "
            f"({which}) are not served"
        )
    check_mask(padding)
    return padding


def check_mask(mask: Any, name: str = "attention_mask") -> None:
    """Raises unless `mask` is None or a mask of two axes that holds 0 and 1, of whatever dtype.

    UnsupportedError for masks that transformers serves by other rules, TypeError for what no call
    of it takes.
    """
    if mask is None:
        return
    plain = isinstance(mask, Tensor) and mask.layout == torch.strided and not mask.is_meta
    if not plain and not isinstance(mask, dict):
        raise TypeError(f"{name}: wanted a tensor [B, columns], got {shown(mask)}")
    if isinstance(mask, dict) or mask.ndim != 2:
        which = "masks by kind of layer" if isinstance(mask, dict) else f"{mask.ndim}D masks"
        custom = "custom 4D masks" if which == "4D masks" else which
        raise UnsupportedError(
            f"{name}: wanted a 2D mask of real tokens [B, columns]; {custom} are not served"
        )
    if mask.dtype == torch.bool:
        return
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise UnsupportedError(
            f"{name}: wanted 0 and 1, got {other[0].item()}: transformers hides the zeros alone, "
            "and counts positions by the sum of the rest; write (mask != 0).long() if so it is "
            "meant"
        )


AttentionMaskInterface.register(NAME, no_mask)
