"""prefill_attention and dense_prefill against float64, within twice eager's error."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.kernels import dense_prefill as dense
from kvpolicy.kernels import prefill_gather
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.ops import Heads
from tests.support.kernels.pool import CUDA, DEVICE, fill_heads, make_pool, randn
from tests.support.kernels.prefill import check, make_segments


@pytest.fixture(params=[(32, 16, False), (16, 32, True)], ids=str)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that short prompts have many."""
    if not CUDA:
        queries, keys, descriptors = request.param
        small = sparse.Tile(queries, keys, 4, 2, descriptors)
        monkeypatch.setattr(sparse, "choose_tile", lambda *_: small)


@pytest.mark.parametrize("window", [1, 7, 40, 63, 64, 65])
def test_windows(window: int, tile: None) -> None:
    check([0, 33], [65, 31], window=window, group=1)


@pytest.mark.parametrize(
    ("starts", "queries"),
    [([0], [1]), ([100], [1]), ([17, 0, 90, 4], [3, 0, 20, 17]), ([0, 5], [0, 0])],
)
def test_ragged_batches(starts: list[int], queries: list[int], tile: None) -> None:
    if not sum(queries):
        empty = randn(4, 0, 32, dtype=torch.float32, seed=1)
        pool = make_pool(4, 16, 32, torch.float32, slab_pages=4)
        table, counts = fill_heads(pool, [[0, 0], [9, 1]], seed=1)
        segments = make_segments(starts, queries, [0, 4])
        near = randn(2, 4, 32, dtype=torch.float32, seed=2)
        flags = torch.zeros(2, 4, dtype=torch.uint8, device=DEVICE)
        got = sparse.prefill_attention(
            empty, near, near, flags, segments, pool.pages, Heads(table, counts), 1, 1.0
        )
        assert got.shape == empty.shape
        return
    check(starts, queries, window=6, rates=(0.9, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("group", "dim", "page", "first"),
    [
        (1, 16, 16, "low"),
        (3, 80, 4, "high"),
        (4, 128, 64, "low"),
        (5, 64, 16, "high"),
        (7, 96, 16, "low"),
        (8, 256, 16, "high"),
    ],
)
def test_groups_and_dims(group: int, dim: int, page: int, first: str, dtype: torch.dtype) -> None:
    check([21], [40], window=9, group=group, dim=dim, page=page, first=first, dtype=dtype)


def test_a_group_too_large_for_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "choose_tile", lambda *_: sparse.Tile(16, 16, 4, 2))
    assert sparse.choose_tile().heads(24) == 12
    check([21], [40], window=9, group=24, kv_heads=1, rates=(0.4,))


def test_more_tiles_than_a_grid_has(tile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = make_segments([70], [50], [75])
    monkeypatch.setattr(prefill_gather, "_MOST_TILES", 5)
    assert sparse.Tile(32, 16, 4, 2).fit(segments, 4).queries(4) == 32  # not seven tiles of 8
    assert sparse.Tile(32, 16, 4, 2).fit(segments, 2).queries(2) == 16
    check([70], [50], window=5, group=4)


def test_heads_far_apart() -> None:
    """Queries of a tile whose offsets have more than 32 bits."""
    pool = make_pool(4, 16, 16, torch.bfloat16, slab_pages=4)
    table, counts = fill_heads(pool, [[0]], seed=1)
    near = randn(1, 4, 16, dtype=torch.bfloat16, seed=2)
    flags = torch.zeros(1, 4, dtype=torch.uint8, device=DEVICE)
    close = randn(3, 4, 16, dtype=torch.bfloat16, seed=3)
    # 4 GB that are not written, so not really taken.
    room = torch.UntypedStorage(2 * ((2 << 30) + 64), device=DEVICE)
    far = close.new_empty(0).set_(room, 0, close.shape, (1 << 30, 16, 1)).copy_(close)
    got, wanted = (
        sparse.prefill_attention(
            query,
            near,
            near,
            flags,
            make_segments([0], [4], [4]),
            pool.pages,
            Heads(table, counts),
            9,
            1.0,
        )
        for query in (far, close)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (1.0, 1.0), (1.0, 0.02)])
def test_admitted_fractions(rates: tuple[float, float], tile: None) -> None:
    check([70], [50], window=5, rates=rates, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("starts", "queries"), [([0, 0], [1, 65]), ([40, 0, 5], [7, 0, 20])])
def test_dense(starts: list[int], queries: list[int], dtype: torch.dtype) -> None:
    check(starts, queries, window=6, rates=(1.0, 1.0), dtype=dtype, op="dense", group=3)


def test_dense_tiles(tile: None) -> None:
    keys = [randn(2, 70, 32, dtype=torch.float32, seed=s) for s in (1, 2)]
    query = randn(6, 33, 32, dtype=torch.float32, seed=3)
    got = dense._tiles(query, *keys, 37, 0.2)
    want = dense._causal(query.cpu(), *(k.cpu() for k in keys), 37, 0.2)
    torch.testing.assert_close(got.cpu(), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("op", ["sparse", "dense"])
def test_float64_is_refused(op: str) -> None:
    with pytest.raises(TypeError, match=r"query is torch\.float64"):
        check([0], [3], window=2, dtype=torch.float64, op=op)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_prompts_on_a_device(dim: int, dtype: torch.dtype) -> None:
    check([1500, 0], [777, 1100], window=256, dim=dim, dtype=dtype, kv_heads=2, group=4)
