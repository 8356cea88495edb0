"""Pools of random pages, as large as the benchmarks want them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Heads, Segments
from ..store.pool import PagePool
from .context import Bench

SPREAD = (0.4, 1.6)  # shortest and longest head of a ragged layer, over the mean


def ragged(mean: int, heads: int) -> list[int]:
    """Lengths of heads between SPREAD times the mean; their average is the mean."""
    low, high = SPREAD
    return [round(mean * (low + (high - low) * h / max(heads - 1, 1))) for h in range(heads)]


def stored(
    bench: Bench, sets: list[list[int]], page: int, dim: int, summaries: bool = False,
    dim_v: int | None = None,
) -> tuple[PagePool, list[Heads]]:  # fmt: skip
    """A pool of random keys and values, and per set the heads of one sequence.

    Pages lie in random order. `summaries` fills in each page's smallest and largest key.
    """
    from ..kernels import page_io

    width = (2 * dim, bench.dtype) if summaries else None
    pool = PagePool(
        page_size=page, head_dim=dim, value_dim=dim_v, dtype=bench.dtype,
        device=bench.device, summary=width, moving=False, copy=page_io.copy_pages,
    )  # fmt: skip
    needed = [[-(-n // page) for n in lengths] for lengths in sets]
    total = sum(map(sum, needed))
    ids = pool.take(total)[torch.randperm(total, device=bench.device)]
    for k, v, meta, summary in pool.extents:
        k.normal_()
        v.normal_()
        meta.zero_()
        if summary is not None:
            summary.copy_(torch.cat([k.amin(1), k.amax(1)], -1))
    found, at = [], 0
    for lengths, counts in zip(sets, needed, strict=True):
        table = torch.zeros(1, len(lengths), max(counts), dtype=torch.int32, device=bench.device)
        for head, n in enumerate(counts):
            table[0, head, :n] = ids[at : at + n]
            at += n
        held = torch.tensor([lengths], dtype=torch.int32, device=bench.device)
        found.append(Heads(table, held))
    return pool, found


def tokens_of(pool: PagePool, ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `[count, D]` of pages `ids` and their summaries, by plain indexing."""
    parts: list[Tensor | None] = []
    for column in (0, 1, 3):
        first, base = pool.extents[0][column], 0
        if first is None:
            parts.append(None)
            continue
        out = first.new_empty(ids.numel(), *first.shape[1:])
        for extent in pool.extents:
            store = extent[column]
            assert store is not None
            mine = (ids >= base) & (ids < base + store.shape[0])
            out[mine] = store[(ids[mine] - base).long()]
            base += store.shape[0]
        parts.append(out)
    k, v, summary = parts
    assert k is not None and v is not None
    return k.flatten(0, 1)[:count], v.flatten(0, 1)[:count], summary


def segments(bench: Bench, start: int, queries: int, keys: int) -> Segments:
    """One sequence's queries from `start` on and its recent keys."""
    numbers = [(0, queries), (0, keys), (start,)]
    on = [torch.tensor(n, dtype=torch.int32, device=bench.device) for n in numbers]
    return Segments(*numbers, *on)  # type: ignore[arg-type]
