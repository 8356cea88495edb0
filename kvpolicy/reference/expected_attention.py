"""Expected logits of keys, and norms of values, straight from pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Pages

_KEYS = 1 << 14  # of a head that are looked at at once


def expected_logits(pages: Pages, heads: Heads, linear: Tensor, square: Tensor | None) -> Tensor:
    """m.k + k'Ck of stored keys `[B, Hq, M * P]`: `Ops.expected_logits`.

    Heads and chunks one by one: how a product is rounded depends on its shape.
    """
    batch, kv_heads, columns = heads.table.shape
    size, dim = pages.k.shape[1:]
    query_heads = linear.shape[1]
    found = linear.new_zeros(batch, query_heads, columns * size)
    m = linear.unflatten(1, (kv_heads, -1))
    c = None if square is None else square.unflatten(1, (kv_heads, -1))
    step = max(_KEYS // size, 1)
    for row, counts in enumerate(heads.counts.tolist()):
        for head, count in enumerate(counts):
            used = -(-count // size)
            for low in range(0, used, step):
                ids = heads.table[row, head, low : min(low + step, used)].long()
                keys = pages.k[ids].flatten(0, 1).to(linear.dtype)  # [n, D]
                out = m[row, head] @ keys.T
                if c is not None:
                    out = out + ((keys @ c[row, head]) * keys).sum(-1)
                place = slice(low * size, low * size + len(keys))
                group = slice(head * m.shape[2], (head + 1) * m.shape[2])
                found[row, group, place] = out
    held = torch.arange(columns * size, device=found.device) < heads.counts[..., None]
    return found.masked_fill_(~held.repeat_interleave(m.shape[2], 1), 0)


def value_norms(pages: Pages, heads: Heads) -> Tensor:
    """|v| of stored values `[B, Hkv, M * P]`: `Ops.value_norms`."""
    ids = heads.table.long()
    wide = torch.promote_types(pages.v.dtype, torch.float32)
    found = pages.v.new_zeros(*ids.shape, pages.v.shape[1], dtype=wide)
    for row in range(ids.shape[0]):
        norms = torch.linalg.vector_norm(pages.v[ids[row]], dim=-1, dtype=wide)
        found[row] = norms
    out = found.flatten(2)
    held = torch.arange(out.shape[2], device=out.device) < heads.counts[..., None]
    return out.masked_fill_(~held, 0)
