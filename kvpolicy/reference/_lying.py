"""Pages of heads that lie in a row, as prompts leave them: products read them where they lie."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """Where pages of `heads` (counted over sequences) lie in a row.

    The first `length` pages of head i are `first + i * stride` and on; 0 where there are none, or
    where heads are ragged. `others` `[heads * n]` are the pages after them, head after head.
    """

    heads: int
    first: int
    length: int
    stride: int
    others: Tensor


def lying(store: Tensor, row: Row, tokens: int) -> Tensor:
    """The first `tokens` `[heads, tokens, D]` of pages that lie in a row; a view."""
    size, dim = store.shape[1:]
    page = size * dim
    return store.as_strided(
        (row.heads, tokens, dim), (row.stride * page, dim, 1),
        store.storage_offset() + row.first * page,
    )  # fmt: skip


# Tables change once in `page_size` tokens: by a table's id its last answer, and what it is for.
_ROWS: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Row]] = {}


def row_of(table: Tensor, used: int) -> Row:
    """Where the first `used` pages of each head of `table` `[B, Hkv, M]` lie."""
    if table.is_inference():  # such tensors have no version
        return _find(table[:, :, :used])
    version, key = (table._version, used), id(table)
    before = _ROWS.get(key)
    if before is not None and before[1] == version and before[0]() is table:
        return before[2]
    found = _find(table[:, :, :used])
    _ROWS[key] = weakref.ref(table, lambda _: _ROWS.pop(key, None)), version, found
    return found


def _find(ids: Tensor) -> Row:
    pages = ids.flatten(0, 1)
    heads, width = pages.shape
    if not pages.numel():
        return Row(heads, 0, 0, 0, pages.flatten())
    first = int(pages[0, 0])
    stride = int(pages[1, 0]) - first if heads > 1 else width
    wanted = torch.arange(heads, device=ids.device)[:, None] * stride + first
    wanted = wanted + torch.arange(width, device=ids.device)
    same = (pages == wanted).all(0).tolist()
    length = same.index(False) if False in same else width
    length = max(min(length, stride), 0)
    return Row(heads, first, length, stride, pages[:, length:].flatten())
