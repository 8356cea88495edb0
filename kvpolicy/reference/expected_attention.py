"""Expected logits of keys, straight from pages."""

from __future__ import annotations

from torch import Tensor

from ..ops import Heads, Pages
from ._heads import each_chunk


def expected_logits(pages: Pages, heads: Heads, linear: Tensor, square: Tensor | None) -> Tensor:
    """m.k + k'Ck of stored keys `[B, Hq, M * P]`: `Ops.expected_logits`.

    Heads and chunks one by one: how a product is rounded depends on its shape.
    """
    batch, kv_heads, columns = heads.table.shape
    size = pages.k.shape[1]
    query_heads = linear.shape[1]
    found = linear.new_zeros(batch, query_heads, columns * size)
    m = linear.unflatten(1, (kv_heads, -1))
    c = None if square is None else square.unflatten(1, (kv_heads, -1))
    for row, head, low, own in each_chunk(pages.k, heads):
        keys = own.to(linear.dtype)  # [n, D]
        out = m[row, head] @ keys.T
        if c is not None:
            out = out + ((keys @ c[row, head]) * keys).sum(-1)
        group = slice(head * m.shape[2], (head + 1) * m.shape[2])
        found[row, group, low : low + len(keys)] = out
    return found
