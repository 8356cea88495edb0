"""Summaries of pages, for selections that score pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import pages_of
from .layer import LayerStore
from .state import CacheState

SCRATCH = 64 << 20  # bytes of keys and values that are read at once


def summarize(state: CacheState, layer: LayerStore, before: Tensor, span: int) -> None:
    """Recomputes the summaries of pages that hold tokens from index `before` `[B, Hkv]` on.

    They are at most `span` a head. For heads with fewer the last page is done again, so that the
    host need not know; an empty head has the null page, whose summary nobody reads. Few pages a
    head are read at a time where there are many heads. One op does it where a summary is a page's
    smallest and largest key.
    """
    if layer.selection.neutral or layer.slides or not span:
        return
    if layer.selection.extends_minmax:
        state.ops.write_minmax(layer.pool.pages, layer.heads, before, span)
        return
    size, after = layer.pool.page_size, layer.counts
    last = (pages_of(after, size) - 1).clamp(min=0)
    step = max(SCRATCH // (layer.pool.kv_bytes * after.numel()), 1)
    for some in torch.arange(span, device=before.device).split(step):
        column = ((before // size)[..., None] + some).minimum(last[..., None]).long()
        held = (after[..., None] - column * size).clamp(1, size)
        refresh_summary(state, layer, layer.table.gather(2, column).flatten(), held.flatten())


def refresh_last(state: CacheState, layer: LayerStore) -> None:
    """Recomputes the summary of the last page of each head, which a decoded token may have met."""
    size = layer.pool.page_size
    last = ((layer.counts - 1) // size).clamp(min=0).long()
    ids = layer.table.gather(2, last[..., None])[..., 0]
    held = (layer.counts - last.int() * size).flatten()
    refresh_summary(state, layer, ids.flatten(), held)


def refresh_summary(state: CacheState, layer: LayerStore, ids: Tensor, counts: Tensor) -> None:
    """Computes the summaries of pages `ids` `[N]` holding `counts` `[N]` tokens."""
    keys = state.ops.read_pages(layer.pool.pages, ids)[0]
    valid = torch.arange(keys.shape[1], device=ids.device) < counts[:, None]
    state.ops.write_summary(layer.pool.pages, ids, summary_of(layer, keys, valid))


def summary_of(layer: LayerStore, keys: Tensor, valid: Tensor) -> Tensor:
    """What the selection says of pages: keys `[N, P, D]` and valid `[N, P]` to `[N, S]`."""
    summary = layer.selection.summarize(keys, valid)
    if summary.ndim != 2 or summary.shape[0] != keys.shape[0]:
        raise ValueError(
            f"{type(layer.selection).__name__}.summarize: wanted [{keys.shape[0]}, S], got "
            f"{list(summary.shape)}"
        )
    width = layer.pool.pages.summary.shape[1]  # type: ignore[union-attr]
    return torch.nn.functional.pad(summary, (0, width - summary.shape[1]))
