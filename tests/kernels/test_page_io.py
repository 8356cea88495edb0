"""Page reads, copies and summaries against the reference; compaction too."""

from __future__ import annotations

import pytest
import torch
from pool import DEVICE, fill_heads, make_pool, randn

from kvpolicy import reference
from kvpolicy.kernels import compact, page_io

CASES = [
    (16, 80, torch.float32, "low"),
    (64, 64, torch.bfloat16, "high"),
    (16, 24, torch.float16, "low"),
]


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("page", "dim", "dtype", "first"), CASES)
def test_page_io(page: int, dim: int, dtype: torch.dtype, first: str) -> None:
    pool = make_pool(12, page, dim, dtype, slab_pages=4, width=2 * dim, first=first)
    fill_heads(pool, [[page + 1, 0, 2 * page]], seed=1)
    want = pool.flat()
    ids = torch.tensor([[11, 0, 3], [4, 7, 8]], dtype=torch.int32, device=DEVICE)
    for got, expected in zip(
        page_io.read_pages(pool.pages, ids), reference.read_pages(want, ids), strict=True
    ):
        assert_same(got, expected)
    assert_same(page_io.read_summary(pool.pages, ids), reference.read_summary(want, ids))
    new = randn(4, 2 * dim, dtype=torch.float32, seed=2)
    into = torch.tensor([2, 0, 9, 5], device=DEVICE)
    page_io.write_summary(pool.pages, into, new)
    reference.write_summary(want, into, new)
    source, target = torch.tensor([[1, 5, 9], [10, 2, 6]], dtype=torch.int32, device=DEVICE)
    page_io.copy_pages(pool.pages, source, target)
    reference.copy_pages(want, source, target)
    got = pool.flat()
    for name in ("k", "v", "meta", "summary"):
        assert_same(getattr(got, name), getattr(want, name))


def test_no_pages() -> None:
    pool = make_pool(4, 16, 16, torch.float32, slab_pages=4, width=32)
    none = torch.zeros(2, 0, dtype=torch.int32, device=DEVICE)
    k, _, meta = page_io.read_pages(pool.pages, none)
    assert k.shape == (2, 0, 16, 16) and meta.shape == (2, 0, 16)
    assert page_io.read_summary(pool.pages, none).shape == (2, 0, 32)
    page_io.copy_pages(pool.pages, none[0], none[1])
    page_io.write_summary(pool.pages, none[0], torch.zeros(0, 32, device=DEVICE))


@pytest.mark.parametrize(("page", "dim", "dtype", "first"), CASES)
def test_move(page: int, dim: int, dtype: torch.dtype, first: str) -> None:
    pool = make_pool(24, page, dim, dtype, slab_pages=8, first=first)
    lengths = [[page + 3, 0], [2 * page, 1]]
    source, counts = fill_heads(pool, lengths, seed=3)
    tokens = source.shape[2] * page
    kept = torch.rand(2, 2, tokens, generator=torch.Generator().manual_seed(4)) < 0.5
    kept &= torch.arange(tokens) < counts.cpu()[..., None]
    dest = torch.where(kept, kept.cumsum(-1) - 1, -1).int().to(DEVICE)
    height = int(pool.pages.top)
    target = pool.pages.free[height - 12 : height].view(2, 2, 3)
    want = pool.flat()
    reference.move(want, source, target, dest)
    compact.move(pool.pages, source, target, dest)
    got = pool.flat()
    for name in ("k", "v", "meta"):
        assert_same(getattr(got, name), getattr(want, name))
    assert kept.any() and not torch.isnan(got.k[target[0, 0, 0], 0]).any()
