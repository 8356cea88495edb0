"""Tokens of one head after the other, a chunk at a time: products are rounded by their shape."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..ops import Heads

_KEYS = 1 << 14  # tokens of a head that are looked at at once


def each_chunk(store: Tensor, heads: Heads) -> Iterator[tuple[int, int, int, Tensor]]:
    """Sequence, KV head, first token and the tokens `[n, D]` that are stored from there on."""
    size = store.shape[1]
    step = max(_KEYS // size, 1)
    for row, counts in enumerate(heads.counts.tolist()):
        for head, count in enumerate(counts):
            for low in range(0, min(-(-count // size), heads.table.shape[2]), step):
                ids = heads.table[row, head, low : min(low + step, -(-count // size))].long()
                yield row, head, low * size, store[ids].flatten(0, 1)[: count - low * size]
