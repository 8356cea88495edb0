"""`logits_to_keep`: which columns of a forward the head makes logits of.

The head comes after the decoder, whose cache has taken the tokens by then; so what cannot be picked
is refused before.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils
from transformers.generation import GenerationConfig

from ..._fields import shown
from ...errors import UnsupportedError

NAME = "logits_to_keep"
# Newer versions of transformers pick by a function, which takes another row of positions per row.
_PICK = getattr(modeling_utils, "slice_logits_to_keep", None)


def picked(value: Any, rows: int, columns: int) -> Tensor:
    """What a model picks of `[rows, columns, 1]`; each column holds its number.

    Raises ValueError, or TypeError for what picks nothing anywhere.
    """
    whole = torch.arange(columns)[None, :, None].expand(rows, -1, -1)
    at = value.cpu() if isinstance(value, Tensor) else value
    try:
        if _PICK is not None:
            return torch.as_tensor(_PICK(whole, at))
        return whole[:, slice(-at, None) if isinstance(at, int) else at, :]
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        number = isinstance(value, Tensor) and value.is_floating_point()
        kind = TypeError if number or isinstance(value, str | float) else ValueError
        raise kind(
            f"{NAME}: wanted how many of the last columns, positions below {columns} ([N], or "
            f"[B, N]), or a mask of columns, got {shown(value)}: {str(error).splitlines()[0]}"
        ) from error


def check_logits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for a forward's `logits_to_keep` that picks no columns."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    value = kwargs.get(NAME, 0)
    if isinstance(value, int) or NAME not in names:
        return
    given = [x for n in ("inputs_embeds", "input_ids") if (x := kwargs.get(n)) is not None]
    if given and given[0].ndim > 1:
        picked(value, *given[0].shape[:2])


def check_generated(
    config: GenerationConfig,
    kwargs: dict[str, Any],
    batch: int,
    copies: int,
    columns: int,
    more: bool,
) -> None:
    """The same for `generate` of `copies` after each of `batch` prompts, with `columns` to read.

    Each forward must pick columns of its own, with a token's logits last. Raises UnsupportedError
    for what picks some of the prompt, but nothing of a decode step, where `more` tokens may follow.
    """
    value = kwargs.get(NAME, 1)
    if isinstance(value, int) and value >= 0:
        return
    rows = batch * copies
    if isinstance(value, Tensor) and copies > 1:
        if not value.ndim:
            raise ValueError(f"{NAME}: wanted a row for each answer, got {shown(value)}")
        value = value.repeat_interleave(copies, dim=0)
    size = kwargs.get("prefill_chunk_size", config.prefill_chunk_size) or columns
    size = max(min(size, columns), 1)
    for width in {size, columns % size or size}:
        _check_last(picked(value, rows, width), rows, value)
    if not more:
        return
    try:
        _check_last(picked(value, rows, 1), rows, value)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{NAME}: {shown(value)} picks nothing of a decode step, which has one column; "
            "generate one token, or leave it out"
        ) from error


def _check_last(found: Tensor, rows: int, value: Any) -> None:
    if found.ndim != 3 or found.shape[0] != rows or not found.shape[1]:
        raise ValueError(
            f"{NAME}: wanted a column or more of each row, whose last one says the next token, got "
            f"{shown(value)}"
        )
