"""What plain arguments of public functions take; see `_fields` for those of classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._fields import check_int, check_number, shown

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def wrong(name: str, wanted: str, value: Any, instead: str = "") -> str:
    """The sentence about an argument; `instead` is what to write."""
    return f"{name}: wanted {wanted}, got {shown(value)}" + (f"; {instead}" if instead else "")


def check_kind(
    name: str, value: Any, kind: type | tuple[type, ...], wanted: str, instead: str = ""
) -> None:
    """Raises TypeError unless `value` is an instance of `kind`, which `wanted` says in words."""
    if not isinstance(value, kind):
        raise TypeError(wrong(name, wanted, value, instead))


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a bool."""
    check_kind(name, value, bool, "a bool")


def check_text(name: str, value: Any, wanted: str = "a string") -> None:
    """Raises TypeError unless `value` is a string."""
    check_kind(name, value, str, wanted)


def check_path(name: str, value: Any, wanted: str = "a path: a string or a Path") -> None:
    """Raises TypeError unless `value` is a path of strings, ValueError for an empty one."""
    if isinstance(value, bytes) or not isinstance(value, str | os.PathLike):
        raise TypeError(wrong(name, wanted, value))
    if not os.fspath(value):
        raise ValueError(wrong(name, wanted, value))


def check_dtype(name: str, value: Any) -> None:
    """Raises TypeError for what is no dtype, ValueError for one that caches cannot have."""
    wanted = "one of " + ", ".join(map(str, DTYPES))
    if not isinstance(value, torch.dtype):
        known = isinstance(value, str) and value in {str(x).removeprefix("torch.") for x in DTYPES}
        raise TypeError(wrong(name, wanted, value, f"write torch.{value}" if known else ""))
    if value not in DTYPES:
        raise ValueError(wrong(name, wanted, value))


def check_fraction(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, 1]."""
    check_number(name, value, "a fraction in [0, 1]", lambda x: 0 <= x <= 1)


def optional(check: Callable[..., None], name: str, value: Any, *more: Any) -> None:
    """None, or what `check` takes."""
    if value is not None:
        check(name, value, *more)


def check_ids(name: str, value: Any, wanted: str = "token ids [B, S]") -> None:
    """Raises unless `value` is a tensor of integers with two axes and a column or more."""
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(value, str):
            hint = "write tokenizer(text, return_tensors='pt').input_ids"
        elif isinstance(value, Mapping) and "input_ids" in value:
            hint = f"write {name}=inputs['input_ids']"
        elif isinstance(value, Sequence) and value and isinstance(value[0], int):
            hint = "write torch.tensor([ids])"
        raise TypeError(wrong(name, wanted, value, hint))
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        hint = "write tokenizer(text, return_tensors='pt').input_ids, which are integers"
        raise TypeError(wrong(name, wanted, value, hint))
    if value.ndim != 2:
        hint = f"write {name}[None]" if value.ndim == 1 else ""
        raise ValueError(wrong(name, wanted, value, hint))
    if not value.shape[1]:
        raise ValueError(wrong(name, f"{wanted} of one column or more", value))


def check_embeds(name: str, value: Any) -> None:
    """Raises unless `value` is a tensor of floats with three axes."""
    wanted = "embeddings [B, S, hidden]"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(wrong(name, wanted, value))
    if value.ndim != 3:
        raise ValueError(wrong(name, wanted, value))


def check_mask(name: str, value: Any) -> None:
    """Raises unless `value` is a tensor with two axes."""
    if not isinstance(value, Tensor):
        raise TypeError(wrong(name, "a mask [B, S] of real tokens", value))
    if value.ndim != 2:
        raise ValueError(wrong(name, "a mask [B, S] of real tokens", value))


def check_rows(name: str, value: Any, wanted: str = "a list of numbers of sequences") -> None:
    """Raises TypeError unless `value` is a list of ints, or the like."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not listed or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise TypeError(wrong(name, wanted, value))


def rows_below(name: str, rows: Tensor | Sequence[int], batch: int) -> list[int]:
    """Numbers of sequences as a list; raises unless each is from 0 below `batch`."""
    found = rows.tolist() if isinstance(rows, Tensor) else rows
    check_rows(name, found)
    for row in found:
        if not 0 <= row < batch:
            raise ValueError(f"{name}: wanted sequences from 0 below {batch}, got {row!r}")
    return list(found)


def check_sizes_of(**sizes: Any) -> None:
    """Raises unless all are ints of at least 1."""
    for name, value in sizes.items():
        check_int(name, value, 1)
