"""The token columns that went through a cache, and which of them are real."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
