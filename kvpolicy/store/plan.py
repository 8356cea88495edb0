"""What a cache will hold in bytes, from a cache on the "meta" device that takes no memory."""

from __future__ import annotations

from typing import Protocol

import attrs

from ..ops import pages_of
from ..spec import CacheSpec
from .extents import SLAB_PAGES
from .numbers import narrow, widen
from .sizes import number_bytes, query_bytes, ring_bytes, statistics_bytes, table_bytes
from .state import CacheState

Counts = list[list[int]]  # [layer][head]


class Pipeline(Protocol):
    """What planning needs of a CachePipeline, which lies above the store."""

    def dry(self, spec: CacheSpec, batch: int) -> CacheState: ...


@attrs.frozen(kw_only=True)
class Planned:
    """Bytes of a cache after a prompt; see `Report` for the parts.

    `prompt_pages` are the pages before a prompt-end eviction, `reserved` the most that stays
    allocated beside the pages.
    """

    pages: int
    prompt_pages: int
    reserved: int
    ring: int
    positions: int
    summaries: int
    tables: int
    queries: int
    numbers: int
    statistics: int


def planned(
    pipeline: Pipeline, spec: CacheSpec, tokens: int, batch: int, written: Counts, left: Counts
) -> Planned:
    """Bytes after a prompt of `tokens` tokens in each of `batch` sequences.

    `written` and `left` are the global tokens of one sequence's heads, before and after the
    prompt's end.
    """
    state = pipeline.dry(spec, batch)
    state.widen(tokens)
    for counts in (written, left):
        most = max((n for x in state.managed for n in counts[x.index]), default=0)
        (widen if counts is written else narrow)(state, most + spec.interval)
    pages = prompt_pages = reserved = positions = summaries = 0
    for pool in state.devices.pools:
        own = [layer for layer in state.managed if layer.pool is pool]
        heads = sum(layer.counts.numel() for layer in own)
        used, before = (
            batch * sum(pages_of(n, pool.page_size) for x in own for n in counts[x.index])
            for counts in (left, written)
        )
        # Growth comes in slabs; while decoding, every head may hold a reserved page as well.
        spare = max(SLAB_PAGES, used // 16) + SLAB_PAGES + heads
        pool.provide(used + spare, free=pool.capacity - 1)
        pages += used * pool.kv_bytes
        prompt_pages += before * pool.kv_bytes
        positions += used * pool.meta_bytes
        summaries += used * pool.summary_bytes
        reserved += spare * pool.page_bytes
    return Planned(
        pages=pages,
        prompt_pages=prompt_pages,
        reserved=reserved,
        ring=ring_bytes(state),
        positions=positions,
        summaries=summaries,
        tables=table_bytes(state),
        queries=query_bytes(state),
        numbers=number_bytes(state),
        statistics=statistics_bytes(state),
    )
