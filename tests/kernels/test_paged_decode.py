"""paged_decode against float64, within twice the error of eager low precision."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.kernels import paged_decode as module
from kvpolicy.kernels.paged_decode import paged_decode
from kvpolicy.ops import Heads
from tests.support.kernels.decode import check, ring_of
from tests.support.kernels.pool import CUDA, DEVICE, fill_heads, make_pool, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (3, 80), (4, 128), (5, 64), (7, 96), (8, 256)])
def test_groups_and_dims(group: int, dim: int, dtype: torch.dtype) -> None:
    check([[65, 0], [1, 17]], group=group, dim=dim, dtype=dtype)


@pytest.mark.parametrize(
    ("page", "first"), [(4, "low"), (16, "high"), (48, "low"), (64, "low"), (128, "high")]
)
def test_page_sizes_and_ragged_heads(page: int, first: str) -> None:
    check([[0, 700, 63]], group=2, dim=32, dtype=torch.bfloat16, page=page, first=first)


@pytest.mark.parametrize(
    ("window", "slots", "length"),
    [
        (1, 1, 0),
        (1, 1, 7),
        (4, 4, 2),
        (4, 4, 9),
        (5, 37, 4),
        (70, 102, 69),
        (70, 102, 300),
        (65, 65, 64),
    ],
)
def test_windows(window: int, slots: int, length: int) -> None:
    check([[0], [20]], group=2, dim=32, dtype=torch.float32, window=window, slots=slots,
          lengths=[length, length + 3])  # fmt: skip


def test_inactive_rows_are_zero() -> None:
    check([[20, 3], [9, 40], [0, 0]], group=4, dim=64, dtype=torch.bfloat16,
          active=[True, False, True])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [4, 16, 64, 128])
def test_selected_pages(page: int, dtype: torch.dtype) -> None:
    selected = torch.tensor([[[0, 2, 4, -1], [-1, -1, -1, -1]]], dtype=torch.int32, device=DEVICE)
    check([[page * 5 - 1, 0]], group=3, dim=48, dtype=dtype, page=page, selected=selected)


def test_selected_per_query_head() -> None:
    selected = torch.tensor(
        [[[0, -1], [1, 2], [2, -1], [0, 1]], [[0, -1], [-1, 0], [0, -1], [-1, -1]]], device=DEVICE
    ).int()
    check([[40, 35], [3, 12]], group=2, dim=64, dtype=torch.float32, selected=selected)


@pytest.mark.parametrize("processors", [1, 3, 17])
def test_any_number_of_splits(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processors", lambda device: processors)
    check([[900, 1, 130], [0, 70, 64], [5, 333, 0]], group=2, dim=32, dtype=torch.float32,
          page=16, window=70, slots=102, active=[True, False, True])  # fmt: skip


def test_blocks_of_a_long_head_go_to_all_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits have one length but for a block, though the blocks do not divide by the programs."""
    monkeypatch.setattr(module, "processors", lambda device: 8)
    ran: dict[str, torch.Tensor] = {}

    def reduce(part, lse, *rest, **options):
        ran["lse"] = lse

    monkeypatch.setattr(module, "_reduce", {(1, 1): reduce})
    pool = make_pool(130, 16, 32, torch.float32, slab_pages=32)
    table, counts = fill_heads(pool, [[2048]], seed=5)
    ring = randn(1, 1, 4, 32, dtype=torch.float32, seed=7)
    query = torch.zeros(1, 1, 32, device=DEVICE)
    lengths = torch.tensor([2048], device=DEVICE)
    paged_decode(
        query, pool.pages, Heads(table, counts), ring_of(ring, ring), lengths, lengths > 0, 4, 1.0
    )
    tokens = ran["lse"][:15, 0].exp2()  # a query of zeros: the sum of weights counts tokens
    assert tokens.round().tolist() == [4 + 128, 192, 192] + 12 * [128]


def test_many_splits_agree_bit_for_bit_and_float64_is_refused() -> None:
    pool = make_pool(80, 16, 32, torch.float16, slab_pages=32)
    table, counts = fill_heads(pool, [[1200, 30]], seed=5)
    query = randn(1, 2, 32, dtype=torch.float16, seed=6)
    ring = randn(1, 2, 4, 32, dtype=torch.float16, seed=7)
    rest = (
        Heads(table, counts),
        ring_of(ring, ring),
        torch.tensor([1300], device=DEVICE),
        torch.ones(1, device=DEVICE).bool(),
        4,
        0.2,
    )
    once, twice = (paged_decode(query, pool.pages, *rest) for _ in range(2))
    assert torch.equal(once, twice)
    with pytest.raises(TypeError, match="query is torch.float64"):
        paged_decode(query.double(), pool.pages, *rest)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page", [16, 64])
def test_long_heads_on_a_device(page: int, dtype: torch.dtype) -> None:
    check([[20011, 0, 5, 3000], [1, 40, 7777, 0]], group=4, dim=128, dtype=dtype, page=page,
          window=256, slots=288)  # fmt: skip
