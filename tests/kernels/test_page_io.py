"""Page reads, copies and summaries against the reference."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import Quest, reference
from kvpolicy.kernels import page_io, page_minmax
from kvpolicy.ops import Heads, load
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
    table = torch.tensor([[11, 0, 3, 9], [4, 7, 8, 2]], dtype=torch.int32, device=DEVICE)
    ids = table[:, :3]
    for part in (ids, table[:, ::2], table[1:, :2], table[:, 3:], table.T, table[0], table[None]):
        for got, expected in zip(
            page_io.read_pages(pool.pages, part), reference.read_pages(want, part), strict=True
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


@pytest.mark.parametrize(("page", "dim", "dtype", "first"), CASES)
def test_minmax_is_what_quest_says_of_pages(page, dim, dtype, first) -> None:
    """Poisoned slots past the counts are not looked at, and no other page is written."""
    pool = make_pool(12, page, dim, dtype, slab_pages=4, width=2 * dim, first=first)
    table, counts = fill_heads(pool, [[page + 1, 0, 2 * page], [3, 2 * page, 1]], seed=1)
    want, keys = pool.flat(), pool.flat().k
    before = torch.tensor([[page, 0, 2 * page], [0, 5, 0]], dtype=torch.int32, device=DEVICE)
    changed = [(0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0)]  # row, head, page
    for b, h, m in changed:
        held = torch.arange(page, device=DEVICE) < counts[b, h] - m * page
        id = int(table[b, h, m])
        want.summary[id] = Quest(budget=1).summarize(keys[None, id], held[None])[0]
    stale = pool.flat()
    stale.summary[[int(table[place]) for place in changed]] = 7.0
    pool.fill(stale)
    page_minmax.write_minmax(pool.pages, Heads(table, counts), before, 3)
    assert_same(pool.flat().summary, want.summary)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_minmax_wants_room_for_it(backend: str) -> None:
    pool = make_pool(4, 16, 16, torch.float32, slab_pages=4, width=16)
    heads = Heads(*(torch.zeros(1, 2, dtype=torch.int32, device=DEVICE) for _ in range(2)))
    with pytest.raises(ValueError, match=r"write_minmax: minmax wants summaries \[n, 32\]"):
        load(backend).write_minmax(pool.pages, heads, heads.counts, 1)
