"""A decoded token checked against float64, within twice eager's error."""

from __future__ import annotations

import torch

from kvpolicy import reference
from kvpolicy.kernels.paged_decode import paged_decode
from kvpolicy.ops import Heads, Ring
from tests.support.kernels.plain import NOTHING, Asks, assert_asked_matters, attention
from tests.support.kernels.pool import (
    DEVICE,
    NAN,
    assert_within_budget,
    fill_heads,
    make_pool,
    randn,
)


def ring_of(k: torch.Tensor, v: torch.Tensor) -> Ring:
    return Ring(k, v, torch.zeros(k.shape[:3], dtype=torch.uint8, device=DEVICE))


def check(
    counts: list[list[int]],
    *,
    group: int,
    dim: int,
    dtype: torch.dtype,
    page: int = 16,
    window: int = 5,
    slots: int = 9,
    lengths: list[int] | None = None,
    active: list[bool] | None = None,
    selected: torch.Tensor | None = None,
    first: str = "low",
    asks: Asks = NOTHING,
    backend: str = "triton",
) -> None:
    batch, kv_heads = len(counts), len(counts[0])
    needed = sum(-(-n // page) for row in counts for n in row) + 1
    slab_pages = max(2, 1 << (max(needed // 3, 1).bit_length() - 1))
    dim_v = asks.dim_v or dim
    pool = make_pool(needed, page, dim, dtype, slab_pages=slab_pages, dim_v=dim_v, first=first)
    lengths = lengths or [max(row) + window for row in counts]
    # A head's tokens are the last ones before the window, a gap in their midst.
    positions = [
        [torch.arange(n) + max(end - window + 1 - n, 0) - (torch.arange(n) < n // 2) * 3 for n in r]
        for end, r in zip(lengths, counts, strict=True)
    ]
    positions = [[at.clamp(min=0) for at in row] for row in positions]
    table, held = fill_heads(pool, counts, seed=1, positions=positions)
    alive = active or [True] * batch
    query = asks.sharp * randn(batch, kv_heads * group, dim, dtype=dtype, seed=2)
    shape = batch, kv_heads, slots
    ring_k, ring_v = (randn(*shape, d, dtype=dtype, seed=s) for d, s in ((dim, 3), (dim_v, 4)))
    back = (torch.tensor(lengths)[:, None] - torch.arange(slots)) % slots
    near = (back < window) & (back <= torch.tensor(lengths)[:, None])
    hole = NAN if backend == "triton" else 0.0
    for ring in (ring_k, ring_v):
        ring.masked_fill_(~near.to(DEVICE)[:, None, :, None], hole)
    scale, options = dim**-0.5, asks.options(kv_heads * group)
    pages = pool.flat()
    clean = pages._replace(k=pages.k.nan_to_num(), v=pages.v.nan_to_num())
    op, given = (
        (paged_decode, pool.pages) if backend == "triton" else (reference.paged_decode, clean)
    )
    got = op(
        query, given, Heads(table, held), ring_of(ring_k, ring_v),
        torch.tensor(lengths, device=DEVICE), torch.tensor(alive, device=DEVICE), window, scale,
        selected=selected, **options,
    )  # fmt: skip

    def formula(kind: torch.dtype, asks: Asks) -> torch.Tensor:
        out = torch.zeros(batch, kv_heads * group, dim_v, dtype=kind, device=DEVICE)
        sinks = asks.sinks(kv_heads * group)
        for b in range(batch):
            for head in range(kv_heads * group if alive[b] else 0):
                h = head // group
                n = counts[b][h]
                ids = table[b, h, : -(-n // page)].long()
                seen = torch.arange(len(ids) * page, device=DEVICE) < n
                if selected is not None:
                    chosen = selected[b, head * selected.shape[1] // (kv_heads * group)]
                    seen &= torch.isin(torch.arange(len(seen), device=DEVICE) // page, chosen)
                k = torch.cat([pages.k[ids].flatten(0, 1), ring_k[b, h]]).to(kind)
                v = torch.cat([pages.v[ids].flatten(0, 1), ring_v[b, h]]).to(kind)
                visible = torch.cat([seen, near[b].to(DEVICE)])
                at = torch.cat([pages.meta[ids].flatten().cpu(), lengths[b] - back[b]])
                visible &= asks.near(torch.tensor(lengths[b]), at).to(DEVICE)
                sink = None if sinks is None else sinks[head]
                row = query[b, head, None].to(kind), k[visible], v[visible]
                some = visible[None, visible]
                out[b, head] = attention(*row, some, scale, asks, sink)[0]
        return out

    exact = formula(torch.float64, asks)
    allowed = assert_within_budget(got, formula(dtype, asks), exact)
    assert_asked_matters(formula, asks, exact, allowed)
    for b in range(batch):
        assert alive[b] or not got[b].any()
