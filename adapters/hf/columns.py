"""The token columns that went through a cache, and which of them are real."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import UnsupportedError

Chunks = list[tuple[int, Tensor | None]]  # columns; which are real `[B, columns]`, None for all


def append(chunks: Chunks, columns: int, valid: Tensor | None) -> Chunks:
    """`chunks` and then `columns` more; `valid` on the host."""
    if valid is None and chunks and chunks[-1][1] is None:
        return [*chunks[:-1], (chunks[-1][0] + columns, None)]
    return [*chunks, (columns, valid)]


def to_tensors(chunks: Chunks, batch: int) -> dict[str, Tensor]:
    """`chunks` of `batch` sequences for a file."""
    masks = [valid for _, valid in chunks if valid is not None]
    return {
        "columns": torch.tensor([n for n, _ in chunks]),
        "masked": torch.tensor([valid is not None for _, valid in chunks]),
        "valid": torch.cat(masks, 1) if masks else torch.zeros(batch, 0).bool(),
    }


def from_tensors(filed: Mapping[str, Tensor]) -> Chunks:
    """The chunks that `to_tensors` filed."""
    columns, masked = filed["columns"].tolist(), filed["masked"].tolist()
    valid = iter(filed["valid"].split([n for n, m in zip(columns, masked, strict=True) if m], 1))
    return [(n, next(valid) if m else None) for n, m in zip(columns, masked, strict=True)]


def pick(chunks: Chunks, rows: list[int]) -> Chunks:
    """`chunks` of sequences `rows`; -1 stands for one that has seen nothing."""
    if -1 not in rows:
        return [(n, None if v is None else v[rows]) for n, v in chunks]
    there = torch.tensor(rows)[:, None] >= 0
    return [(n, there.expand(-1, n) if v is None else v[rows] & there) for n, v in chunks]


def take_back(chunks: Chunks, drop: int, batch: int) -> tuple[Chunks, list[int]]:
    """`chunks` without the last `drop` columns, and each sequence's real tokens among these."""
    chunks, counts = list(chunks), [0] * batch
    while drop:
        size, valid = chunks.pop()
        cut = min(size, drop)
        drop -= cut
        for row in range(batch):
            counts[row] += cut if valid is None else int(valid[row, size - cut :].sum())
        if cut < size:
            chunks.append((size - cut, None if valid is None else valid[:, : size - cut]))
    return chunks, counts


def real(chunks: Chunks, batch: int) -> Tensor:
    """Which columns are real, bool `[B, columns]`."""
    parts = [torch.ones(batch, n, dtype=torch.bool) if v is None else v for n, v in chunks]
    return torch.cat([torch.ones(batch, 0, dtype=torch.bool), *parts], 1)


def gaps(chunks: Chunks, batch: int) -> list[bool]:
    """Whether a column that is not real follows one that is, for each sequence."""
    began, found = torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)
    for _, valid in chunks:
        if valid is None:
            began = torch.ones_like(began)
            continue
        found |= (valid.long().diff(dim=1) < 0).any(1) | (began & ~valid.all(1))
        began = began | valid.any(1)
    listed: list[bool] = found.tolist()
    return listed


def new_columns(mask: Tensor | None, chunks: Chunks, batch: int, columns: int) -> Tensor | None:
    """The part of a 2D mask that is about the next `columns`.

    A mask is about the next columns alone, or about all that went through and these; what lies
    beyond is about tokens to come. Raises UnsupportedError as `check_stored` does.
    """
    if mask is None:
        return None
    seen = sum(n for n, _ in chunks)
    width = mask.shape[1]
    if mask.shape[0] != batch or (width != columns and width < seen + columns):
        raise ValueError(
            f"attention_mask: wanted [{batch}, {columns}], or at least [{batch}, {seen + columns}] "
            f"with the {seen} columns in the cache, got {list(mask.shape)}"
        )
    if width < seen + columns or not seen:
        return mask[:, :columns]
    check_stored(mask, chunks, batch)
    return mask[:, seen : seen + columns]


def check_stored(mask: Tensor, chunks: Chunks, batch: int) -> None:
    """Raises UnsupportedError if a 2D mask of all columns differs from what is stored of them."""
    stored = real(chunks, batch)
    shown = mask[:, : stored.shape[1]].bool().cpu()
    stored = stored[:: max(batch // max(len(shown), 1), 1)]
    if stored.shape != shown.shape:
        return  # refused elsewhere
    if bool((shown & ~stored).any()):
        raise UnsupportedError(
            "attention_mask: it shows columns that the cache does not hold, which an earlier mask "
            "hid or whose sequence had ended; pass torch.cat([cache.real(), new_mask], 1)"
        )
    if bool((stored & ~shown).any()):
        raise UnsupportedError(
            "attention_mask: it hides columns that the cache holds; a cache cannot hide them from "
            "one call. Use a new cache, or take trailing columns back by cache.crop"
        )
