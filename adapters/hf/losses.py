"""Losses over padded columns, whose logits no pipeline computes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedError

_SPANS = ("start_positions", "end_positions")  # of answers, whose softmax goes over all columns
_IN_PLACE = ("ForTokenClassification", "ForMaskedLM")  # losses that read a label's own column
_ROWS = ("ForSequenceClassification", "ForQuestionAnswering")  # a label a row


def check_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError for labels of padded columns among a model's arguments.

    A causal loss reads a label's logits from the column before it. The decoder leaves padded
    columns out, so theirs are not transformers'.
    """
    kwargs = named(model, args, kwargs)
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    given = [n for n in ("labels", "shift_labels", *_SPANS) if kwargs.get(n) is not None]
    if not given or bool(mask.all()):
        return
    name = given[-1]
    kind, labels = getattr(model, "loss_type", None), kwargs[name]
    if name in _SPANS:
        wrong = not bool(new_mask(kwargs, mask).all())
    elif kind in _ROWS or labels.ndim != 2:
        wrong = False
    else:
        moved = 0 if name == "shift_labels" or kind in _IN_PLACE else 1
        real = new_mask(kwargs, mask)
        real = real[:, max(real.shape[1] - labels.shape[1], 0) :].bool().to(labels.device)
        counts = labels != kwargs.get("ignore_index", -100)
        same = counts.shape == real.shape  # else the loss says what it wants
        wrong = same and bool((counts[:, moved:] & ~real[:, : real.shape[1] - moved]).any())
    if wrong:
        raise UnsupportedError(
            f"{name}: the loss would count logits of padded columns, which an attached pipeline "
            "does not compute; give rows of one length, or -100 to what reads such a column (a "
            "causal loss reads a label's logits from the column before it)"
        )


def named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def new_mask(kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    """The part of `mask` that is about a forward's own columns."""
    given = [x for n in ("inputs_embeds", "input_ids") if (x := kwargs.get(n)) is not None]
    columns = given[0].shape[1] if given else mask.shape[1]
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None or mask.shape[1] == columns else cache.get_seq_length()
    return mask[:, seen : seen + columns]
