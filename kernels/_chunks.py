"""Prompt calls of attention in chunks: each chunk of a sequence is a row of its own.

A query sees none but the keys of its own chunk, so a row holds a chunk's queries and the recent
keys from the chunk's start on; the kernels need not know of chunks but for the stored tokens.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import Segments
from ._launch import numbers_on, power_of_two


class Cut(NamedTuple):
    """Rows of a call, and `owner` `[rows]` int32, the sequence of each (None: they are the same).

    `chunk` is None where rows are sequences.
    """

    segments: Segments
    owner: Tensor | None = None
    chunk: int | None = None


def cut_at_chunks(segments: Segments, chunk: int | None) -> Cut:
    """The call's rows: one for each chunk of a sequence that has queries or recent keys."""
    if chunk is None:
        return Cut(segments)
    bounds = segments.cu_q, segments.cu_k, segments.start
    return _cut(*bounds, chunk, segments.start_dev.device)


@lru_cache(maxsize=16)  # layers of a call ask alike
def _cut(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], starts: tuple[int, ...], chunk: int,
    device: torch.device,
) -> Cut:  # fmt: skip
    queries, keys, begins, owner = [0], [0], [], []
    spans = zip(pairwise(cu_q), pairwise(cu_k), starts, strict=True)
    for b, ((q0, q1), (k0, k1), start) in enumerate(spans):
        end = start + q1 - q0
        low = end - (k1 - k0)
        for high in (*range((low // chunk + 1) * chunk, end, chunk), end):
            begins.append(max(low, start))
            queries.append(q0 + max(high - start, 0))
            keys.append(k1 - (end - high))
            owner.append(b)
            low = high
    rows = power_of_two(len(begins))  # kernels are compiled for a number of rows
    spare = rows - len(begins)
    queries, keys = queries + queries[-1:] * spare, keys + keys[-1:] * spare
    begins, owner = begins + [0] * spare, owner + [0] * spare
    bounds = tuple(queries), tuple(keys), tuple(begins)
    on = numbers_on(device, *bounds, tuple(owner))
    cut = Segments(*bounds, on[0, : rows + 1], on[1, : rows + 1], on[2, :rows])
    return Cut(cut, on[3, :rows], chunk)
