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
_LAST = threading.local()  # the padding mask of the last call, for a decoder given only masks


def no_mask(
    *args: Any,
    q_length: int = 1,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """The registered mask function: padding is read from the 2D mask by the decoder's hook.

    Raises UnsupportedError where tokens would see later ones, as within an image.
    """
    _LAST.padding = attention_mask
    if q_length == 1 or mask_function in _PLAIN or torch.compiler.is_compiling():
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


def padding_of(mask: Any) -> Any:
    """The 2D mask of a decoder's forward.

    Wrappers around a decoder make its masks beforehand, one for each kind of layer: then it is what
    our mask function was given.
    """
    padding, _LAST.padding = getattr(_LAST, "padding", None), None
    if not isinstance(mask, dict):
        return mask
    custom = [name for name, value in mask.items() if value is not None and value.ndim != 2]
    if custom:
        raise UnsupportedError(
            f"attention_mask: wanted a 2D mask of real tokens [B, columns]; custom masks "
            f"({', '.join(custom)}) are not served"
        )
    return padding


AttentionMaskInterface.register(NAME, no_mask)
