"""Our mask function: it makes no mask, and sees what a mask would have said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ...errors import UnsupportedError
from .faces import NAME

# The second is of cross attention: a probe refuses a model whose own tokens see later ones.
_PLAIN = (causal_mask_function, bidirectional_mask_function)
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
    if q_length == 1 or mask_function in _PLAIN:
        return
    batch = kwargs.get("batch_size", 1)
    device = kwargs.get("device") or getattr(attention_mask, "device", "cpu")
    row = torch.arange(batch, device=device)[:, None]
    now = torch.arange(q_length - 1, device=device) + q_offset
    later = mask_function(row, torch.zeros_like(row), now, now + 1)
    if isinstance(later, Tensor) and bool(later.any()):
        raise UnsupportedError(
            "attention_mask: tokens would see later ones (those of one image, or of a text read in "
            "both directions), which caches do not hold"
        )


def _check_read(mask: Tensor | None) -> None:
    """Raises UnsupportedError for a mask other than the forward in flight opened with."""
    read = getattr(_LAST, "read", mask)
    if read is mask:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # a mask of ones that the decoder makes itself; an eager step came before
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


def opened(mask: Any) -> None:
    """Says that the decoder's forward goes on with `mask`."""
    _LAST.read = mask


def closed() -> None:
    """Forgets what the last forward saw."""
    for name in ("padding", "read"):
        _LAST.__dict__.pop(name, None)


def padding_of(mask: Any) -> Any:
    """The 2D mask of a decoder's forward.

    Wrappers around a decoder make its masks beforehand, one for each kind of layer: then it is what
    our mask function was given. Raises UnsupportedError for masks that it did not make, ValueError
    for numbers that are neither 0 nor 1.
    """
    made, padding = hasattr(_LAST, "padding"), getattr(_LAST, "padding", None)
    closed()
    if not isinstance(mask, dict):
        check_values(mask)
        return mask
    custom = [name for name, value in mask.items() if value is not None]
    if custom or not made or not mask:
        which = ", ".join(custom or map(str, mask)) or "none"
        raise UnsupportedError(
            f"attention_mask: wanted a 2D mask of real tokens [B, columns]; masks by kind of layer "
            f"({which}) are not served"
        )
    return padding


def check_values(mask: Any) -> None:
    """Raises ValueError if a 2D mask holds numbers other than 0 and 1."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype == torch.bool:
        return
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise ValueError(f"attention_mask: wanted 0 and 1, got {other[0].item()}")


AttentionMaskInterface.register(NAME, no_mask)
