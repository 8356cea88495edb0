"""A prompt call checked against float64, within twice eager's error."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy import reference
from kvpolicy.kernels import dense_prefill as dense
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.ops import MARKED, Heads, Segments
from tests.support.kernels.plain import NOTHING, Asks, assert_asked_matters, attention
from tests.support.kernels.pool import DEVICE, assert_within_budget, fill_heads, make_pool, randn


def make_segments(starts: list[int], queries: list[int], keys: list[int]) -> Segments:
    cu_q, cu_k = ([0, *torch.tensor(x).cumsum(0).tolist()] for x in (queries, keys))
    tensors = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu_q, cu_k, starts))
    return Segments(tuple(cu_q), tuple(cu_k), tuple(starts), *tensors)


def check(
    starts: list[int],
    queries: list[int],
    *,
    window: int,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    page: int = 16,
    rates: tuple[float, ...] = (0.3, 0.0),
    extra: int = 3,
    first: str = "low",
    op: str = "sparse",
    asks: Asks = NOTHING,
    backend: str = "triton",
) -> None:
    generator = torch.Generator().manual_seed(11)
    ends = [s + q for s, q in zip(starts, queries, strict=True)]
    firsts = [max(0, s - window - extra) for s in starts]
    dims = dim, asks.dim_v or dim
    whole = [
        [randn(kv_heads, n, d, dtype=dtype, seed=20 + 2 * b + i) for i, d in enumerate(dims)]
        for b, n in enumerate(ends)
    ]
    rate = torch.tensor(rates)[:, None]
    admitted = [torch.rand(kv_heads, n, generator=generator) < rate for n in ends]
    at = [
        [admit[h, : max(n - window, 0)].nonzero()[:, 0] for h in range(kv_heads)]
        for admit, n in zip(admitted, ends, strict=True)
    ]
    counts = [[len(x) for x in row] for row in at]
    needed = sum(-(-n // page) for row in counts for n in row) + 1
    pool = make_pool(max(needed, 4), page, dim, dtype, slab_pages=4, dim_v=dims[1], first=first)
    table, held = fill_heads(pool, counts, seed=1, positions=at)
    pages = pool.flat()
    for b, row in enumerate(counts):
        for h, n in enumerate(row):
            slots = (table[b, h, torch.arange(n) // page].long(), torch.arange(n) % page)
            for store, source in zip((pages.k, pages.v), whole[b], strict=True):
                store[slots] = source[h, at[b][h].to(DEVICE)]
            pages.meta[slots] |= (torch.rand(n, generator=generator) < 0.5).to(pages.meta) << 30
    pool.fill(pages)
    recent = [
        torch.cat([w[i][:, f:] for w, f in zip(whole, firsts, strict=True)], 1) for i in (0, 1)
    ]
    flags = torch.cat([a[:, f:] for a, f in zip(admitted, firsts, strict=True)], 1)
    flags = (flags.to(torch.uint8) | MARKED).to(DEVICE)
    segments = make_segments(starts, queries, [n - f for n, f in zip(ends, firsts, strict=True)])
    # Queries as they leave a projection: [T, Hq, D], seen as [Hq, T, D].
    query = randn(sum(queries), kv_heads * group, dim, dtype=dtype, seed=3).transpose(0, 1)
    query, scale, options = asks.sharp * query, dim**-0.5, asks.options(kv_heads * group)
    # The reference wants what is unused finite.
    flat = pages._replace(k=pages.k.nan_to_num(), v=pages.v.nan_to_num())
    given = pool.pages if backend == "triton" else flat
    if op == "sparse":
        call = sparse.prefill_attention if backend == "triton" else reference.prefill_attention
        held_by = Heads(table, held)
        got = call(query, *recent, flags, segments, given, held_by, window, scale, **options)
    else:
        call = dense.dense_prefill if backend == "triton" else reference.dense_prefill
        got = call(query, *recent, segments, given, table, scale, **options)

    def formula(kind: torch.dtype, asks: Asks) -> Tensor:
        parts, sinks = [], asks.sinks(kv_heads * group)
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            i = torch.arange(start, end)[:, None]
            j = torch.arange(end)
            visible = (j <= i) & ((i - j < window) | admitted[b][:, None]) & asks.near(i, j)
            own = query[:, segments.cu_q[b] : segments.cu_q[b + 1]].to(kind)
            # All heads at once, as eager models do: products of one head are rounded otherwise.
            k, v = (x.to(kind).repeat_interleave(group, 0) for x in whole[b])
            seen = visible.repeat_interleave(group, 0).to(DEVICE)
            sink = None if sinks is None else sinks[:, None]
            parts.append(attention(own, k, v, seen, scale, asks, sink))
        return torch.cat(parts, 1)

    exact = formula(torch.float64, asks)
    allowed = assert_within_budget(got, formula(dtype, asks), exact)
    assert_asked_matters(formula, asks, exact, allowed)
    assert op == "dense" or any(map(any, counts)) or max(ends) <= window or not any(rates)
