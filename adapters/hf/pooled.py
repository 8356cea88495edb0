"""Heads that read one column of each row, which must not be a padded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .losses import named, new_mask

CLASSIFIER, CHOICE = "ForSequenceClassification", "DoubleHeadsModel"


def check_pooled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError where a head of sequences reads a column that the mask hides.

    The decoder leaves padded columns out, so what it hands on for them is not transformers'.
    """
    kind = type(model).__name__
    if not kind.endswith((CLASSIFIER, CHOICE)):
        return
    kwargs = named(model, args, kwargs)
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return
    mask, ids = new_mask(kwargs, mask).bool(), kwargs.get("input_ids")
    if kind.endswith(CHOICE):
        read, name = _of_choices(kwargs.get("mc_token_ids"), mask), "mc_token_ids"
        instead = "columns of real tokens"
    else:
        read = _of_classes(model.config, ids, mask)
        name = "inputs_embeds" if ids is None else "attention_mask"
        instead = "input_ids padded with the config's pad_token_id"
    if not bool(mask.gather(1, read).all()):
        raise UnsupportedError(
            f"{name}: {kind} would read a padded column, which an attached pipeline does not "
            f"compute; pass {instead}, or rows of one length"
        )


def _of_classes(config: Any, ids: Tensor | None, mask: Tensor) -> Tensor:
    """The column `[B, 1]` that a classifier reads.

    transformers' take the last id that is no padding by `pad_token_id`, the last column of rows
    without ids, and those of encoders turned decoders the first.
    """
    pad = config.get_text_config().pad_token_id
    rows, columns = mask.shape
    if getattr(config, "is_decoder", False):
        return torch.zeros(rows, 1, dtype=torch.long, device=mask.device)
    if ids is None or pad is None:
        return torch.full((rows, 1), columns - 1, device=mask.device)
    places = torch.arange(columns, device=mask.device)
    read: Tensor = (places * (ids.to(mask.device) != pad)).argmax(1, keepdim=True)
    return read


def _of_choices(asked: Any, mask: Tensor) -> Tensor:
    """The columns `[B, n]` that a head of choices reads: those asked for, else the last."""
    rows, columns = mask.shape
    if not isinstance(asked, Tensor):
        return torch.full((rows, 1), columns - 1, device=mask.device)
    return asked.to(mask.device).reshape(rows, -1)
