"""Reading and writing whole pages by id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Pages
from ._launch import cdiv, on, power_of_two
from ._pages import KEYS, META, SUMMARY, VALUES, page_offset

_CHUNK = 2048  # elements of k and of v that one program moves


def read_pages(pages: Pages, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contents of pages `ids` `[...]`; see `Ops.read_pages`."""
    size, dim, dim_v = *pages.k.shape[1:], pages.v.shape[2]
    # The first pages of each head lie in a part of a table, which is read where it is.
    rows = ids if ids.ndim == 2 and ids.stride(1) == 1 else ids.reshape(1, -1).contiguous()
    k, v = (
        torch.empty(*ids.shape, size, d, dtype=x.dtype, device=x.device)
        for x, d in ((pages.k, dim), (pages.v, dim_v))
    )
    most = size * max(dim, dim_v)
    meta = torch.empty(*ids.shape, size, dtype=pages.meta.dtype, device=pages.meta.device)
    if rows.numel():
        with on(pages.k):
            _read_pages[rows.numel(), cdiv(most, _CHUNK)](
                pages.k, pages.v, pages.meta, pages.slabs, rows, rows.shape[1], rows.stride(0),
                k, v, meta,
                SLAB_PAGES=pages.slab_pages, PAGE=size, PAGE_PAD=power_of_two(size), DIM=dim,
                DIM_V=dim_v, CHUNK=min(_CHUNK, power_of_two(most)), num_warps=4,
            )  # fmt: skip
    return k, v, meta


@triton.jit(do_not_specialize=["width", "stride"])
def _read_pages(
    pages_k, pages_v, pages_meta, slabs, ids, width, stride, k, v, meta,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copies a chunk of a page to its place among the pages asked for; the first one its meta."""
    n = tl.program_id(0).to(tl.int64)
    page = tl.load(ids + n // width * stride + n % width)
    e = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = e < PAGE * DIM
    mask_v = e < PAGE * DIM_V
    from_k = page_offset(slabs, page, KEYS, SLAB_PAGES, PAGE * DIM)
    from_v = page_offset(slabs, page, VALUES, SLAB_PAGES, PAGE * DIM_V)
    read_k = tl.load(pages_k + from_k + e, mask=mask, other=0.0)  # [E]
    read_v = tl.load(pages_v + from_v + e, mask=mask_v, other=0.0)  # [E]
    tl.store(k + n * (PAGE * DIM) + e, read_k, mask=mask)
    tl.store(v + n * (PAGE * DIM_V) + e, read_v, mask=mask_v)
    if tl.program_id(1) == 0:
        s = tl.arange(0, PAGE_PAD)
        from_meta = page_offset(slabs, page, META, SLAB_PAGES, PAGE)
        read_meta = tl.load(pages_meta + from_meta + s, mask=s < PAGE, other=0)  # [P]
        tl.store(meta + n * PAGE + s, read_meta, mask=s < PAGE)


def read_meta(pages: Pages, ids: Tensor) -> Tensor:
    """Meta `[..., P]` of pages `ids` `[...]`; see `Ops.read_meta`."""
    size = pages.meta.shape[1]
    flat = ids.reshape(-1).contiguous()  # a reshaped column keeps its stride
    meta = torch.empty(*ids.shape, size, dtype=pages.meta.dtype, device=pages.meta.device)
    if flat.numel():
        with on(meta):
            _read_meta[flat.numel(),](
                pages.meta, pages.slabs, flat, meta,
                SLAB_PAGES=pages.slab_pages, PAGE=size, PAGE_PAD=power_of_two(size), num_warps=1,
            )  # fmt: skip
    return meta


@triton.jit
def _read_meta(
    pages_meta, slabs, ids, meta,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr,
):  # fmt: skip
    """Copies the meta of a page."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, PAGE_PAD)
    start = page_offset(slabs, tl.load(ids + n), META, SLAB_PAGES, PAGE)
    read = tl.load(pages_meta + start + s, mask=s < PAGE, other=0)  # [P]
    tl.store(meta + n * PAGE + s, read, mask=s < PAGE)


def copy_pages(pages: Pages, source: Tensor, target: Tensor) -> None:
    """Copies pages `source` `[N]` to pages `target` `[N]`; see `Ops.copy_pages`."""
    if source.numel() == 0:
        return
    size, dim, dim_v = *pages.k.shape[1:], pages.v.shape[2]
    most = size * max(dim, dim_v)
    width = 0 if pages.summary is None else pages.summary.shape[1]
    with on(pages.k):
        _copy_pages[source.numel(), cdiv(most, _CHUNK)](
            pages.k, pages.v, pages.meta, pages.k if pages.summary is None else pages.summary,
            pages.slabs, source.int().contiguous(), target.int().contiguous(),
            SLAB_PAGES=pages.slab_pages, PAGE=size, PAGE_PAD=power_of_two(size), DIM=dim,
            DIM_V=dim_v, WIDTH=width, WIDTH_PAD=power_of_two(width),
            CHUNK=min(_CHUNK, power_of_two(most)), num_warps=4,
        )  # fmt: skip


@triton.jit
def _copy_pages(
    pages_k, pages_v, pages_meta, summary, slabs, source, target,
    SLAB_PAGES: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copies a chunk of a page to another page; the first one meta and summary too."""
    old = tl.load(source + tl.program_id(0))
    new = tl.load(target + tl.program_id(0))
    e = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = e < PAGE * DIM
    mask_v = e < PAGE * DIM_V
    k = pages_k + e
    v = pages_v + e
    from_k = page_offset(slabs, old, KEYS, SLAB_PAGES, PAGE * DIM)
    from_v = page_offset(slabs, old, VALUES, SLAB_PAGES, PAGE * DIM_V)
    read_k = tl.load(k + from_k, mask=mask, other=0.0)  # [E]
    read_v = tl.load(v + from_v, mask=mask_v, other=0.0)  # [E]
    tl.store(k + page_offset(slabs, new, KEYS, SLAB_PAGES, PAGE * DIM), read_k, mask=mask)
    tl.store(v + page_offset(slabs, new, VALUES, SLAB_PAGES, PAGE * DIM_V), read_v, mask=mask_v)
    if tl.program_id(1) == 0:
        s = tl.arange(0, PAGE_PAD)
        about = pages_meta + s
        from_meta = page_offset(slabs, old, META, SLAB_PAGES, PAGE)
        read_meta = tl.load(about + from_meta, mask=s < PAGE, other=0)  # [P]
        tl.store(about + page_offset(slabs, new, META, SLAB_PAGES, PAGE), read_meta, mask=s < PAGE)
        if WIDTH > 0:
            w = tl.arange(0, WIDTH_PAD)
            extent = summary + w
            from_summary = page_offset(slabs, old, SUMMARY, SLAB_PAGES, WIDTH)
            kept = tl.load(extent + from_summary, mask=w < WIDTH, other=0.0)  # [S]
            to_summary = page_offset(slabs, new, SUMMARY, SLAB_PAGES, WIDTH)
            tl.store(extent + to_summary, kept, mask=w < WIDTH)


def read_summary(pages: Pages, ids: Tensor) -> Tensor:
    """Summaries `[..., S]` of pages `ids` `[...]`; see `Ops.read_summary`."""
    assert pages.summary is not None
    width = pages.summary.shape[1]
    flat = ids.reshape(-1).contiguous()  # a reshaped column keeps its stride
    out = torch.empty(*ids.shape, width, dtype=pages.summary.dtype, device=ids.device)
    if flat.numel():
        with on(out):
            _move_summary[flat.numel(),](
                pages.summary, pages.slabs, flat, out,
                SLAB_PAGES=pages.slab_pages, WIDTH=width, WIDTH_PAD=power_of_two(width),
                READ=True, num_warps=1,
            )  # fmt: skip
    return out


def write_summary(pages: Pages, ids: Tensor, summary: Tensor) -> None:
    """Stores summaries `[N, S]` of pages `ids` `[N]`; see `Ops.write_summary`."""
    assert pages.summary is not None
    if ids.numel() == 0:
        return
    width = pages.summary.shape[1]
    summary = summary.to(pages.summary.dtype).contiguous()
    with on(summary):
        _move_summary[ids.numel(),](
            pages.summary, pages.slabs, ids.contiguous(), summary,
            SLAB_PAGES=pages.slab_pages, WIDTH=width, WIDTH_PAD=power_of_two(width),
            READ=False, num_warps=1,
        )  # fmt: skip


@triton.jit
def _move_summary(
    pool, slabs, ids, dense,
    SLAB_PAGES: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Copies the summary of a page from the pool, or to it if the page is not the null page."""
    n = tl.program_id(0).to(tl.int64)
    page = tl.load(ids + n)
    w = tl.arange(0, WIDTH_PAD)
    stored = pool + page_offset(slabs, page, SUMMARY, SLAB_PAGES, WIDTH) + w
    dense += n * WIDTH + w
    if READ:
        tl.store(dense, tl.load(stored, mask=w < WIDTH, other=0.0), mask=w < WIDTH)  # [S]
    elif page > 0:
        tl.store(stored, tl.load(dense, mask=w < WIDTH, other=0.0), mask=w < WIDTH)  # [S]
