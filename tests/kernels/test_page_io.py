"""Page reads, copies and summaries against the reference."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import page_io
from tests.support.kernels.pool import DEVICE, fill_heads, make_pool, randn

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
    assert_same(page_io.read_meta(pool.pages, ids), reference.read_meta(want, ids))
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
    assert page_io.read_meta(pool.pages, none).shape == (2, 0, 16)
    assert page_io.read_summary(pool.pages, none).shape == (2, 0, 32)
    page_io.copy_pages(pool.pages, none[0], none[1])
    page_io.write_summary(pool.pages, none[0], torch.zeros(0, 32, device=DEVICE))
