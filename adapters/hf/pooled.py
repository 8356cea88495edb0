"""Heads that read one column of each row, which must not be a padded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .losses import named, new_mask


def check_pooled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError where a classifier of sequences reads a column that the mask hides.

    transformers' take the last id that is no padding by `pad_token_id`, the last column of rows
    without ids, and those of encoders turned decoders the first. The decoder leaves padded columns
    out, so what it hands on for them is not transformers'.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return
    kwargs = named(model, args, kwargs)
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return
    mask, ids = new_mask(kwargs, mask).bool(), kwargs.get("input_ids")
    config: Any = model.config
    pad = config.get_text_config().pad_token_id
    rows, columns = mask.shape
    if getattr(config, "is_decoder", False):
        read = torch.zeros(rows, dtype=torch.long, device=mask.device)
    elif ids is None or pad is None:
        read = torch.full((rows,), columns - 1, device=mask.device)
    else:
        places = torch.arange(columns, device=mask.device)
        read = (places * (ids.to(mask.device) != pad)).argmax(1)
    if not bool(mask.gather(1, read[:, None]).all()):
        name = "inputs_embeds" if ids is None else "attention_mask"
        raise UnsupportedError(
            f"{name}: {type(model).__name__} would read a padded column, which an attached "
            "pipeline does not compute; pass input_ids padded with the config's pad_token_id, or "
            "rows of one length"
        )
