"""Reading and writing whole pages by id."""

from __future__ import annotations

from torch import Tensor

from ..ops import Pages

_SCRATCH = 1 << 20  # bytes of pages that are held twice while they move


def read_pages(pages: Pages, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contents of pages `ids` `[...]`: `Ops.read_pages`."""
    flat = ids.reshape(-1).long()
    k = pages.k.index_select(0, flat).view(*ids.shape, *pages.k.shape[1:])
    v = pages.v.index_select(0, flat).view(*ids.shape, *pages.v.shape[1:])
    meta = pages.meta.index_select(0, flat).view(*ids.shape, *pages.meta.shape[1:])
    return k, v, meta


def read_meta(pages: Pages, ids: Tensor) -> Tensor:
    """Meta `[..., P]` of pages `ids` `[...]`: `Ops.read_meta`."""
    return pages.meta.index_select(0, ids.reshape(-1).long()).view(*ids.shape, -1)


def copy_pages(pages: Pages, source: Tensor, target: Tensor) -> None:
    """Copies pages `source` `[N]` to pages `target` `[N]`: `Ops.copy_pages`."""
    step = max(_SCRATCH // pages.k[0].nbytes, 1)
    for some, to in zip(source.long().split(step), target.long().split(step), strict=True):
        for store in (pages.k, pages.v, pages.meta, pages.summary):
            if store is not None:
                store.index_copy_(0, to, store.index_select(0, some))


def read_summary(pages: Pages, ids: Tensor) -> Tensor:
    """Summaries `[..., S]` of pages `ids` `[...]`: `Ops.read_summary`."""
    assert pages.summary is not None
    flat = pages.summary.index_select(0, ids.reshape(-1).long())
    return flat.view(*ids.shape, pages.summary.shape[1])


def write_summary(pages: Pages, ids: Tensor, summary: Tensor) -> None:
    """Stores summaries `[N, S]` of pages `ids` `[N]`: `Ops.write_summary`."""
    assert pages.summary is not None
    keep = ids > 0
    pages.summary.index_copy_(0, ids[keep].long(), summary[keep].to(pages.summary.dtype))
