"""prefill_attention and dense_prefill against float64, within twice eager's error."""

from __future__ import annotations

import pytest
import torch
from pool import DEVICE, assert_within_budget, fill_heads, make_pool, randn

from kvpolicy.kernels import dense_prefill as dense
from kvpolicy.kernels import prefill_gather
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.ops import MARKED, Heads, Segments

CUDA = DEVICE.type == "cuda"


def make_segments(starts: list[int], queries: list[int], keys: list[int]) -> Segments:
    cu_q, cu_k = ([0, *torch.tensor(x).cumsum(0).tolist()] for x in (queries, keys))
    tensors = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu_q, cu_k, starts))
    return Segments(tuple(cu_q), tuple(cu_k), tuple(starts), *tensors)


def check(
    starts: list[int],
    queries: list[int],
    *,
    window: int,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    page: int = 16,
    rates: tuple[float, ...] = (0.3, 0.0),
    extra: int = 3,
    first: str = "low",
    op: str = "sparse",
) -> None:
    generator = torch.Generator().manual_seed(11)
    ends = [s + q for s, q in zip(starts, queries, strict=True)]
    firsts = [max(0, s - window - extra) for s in starts]
    whole = [
        [randn(kv_heads, n, dim, dtype=dtype, seed=20 + 2 * b + i) for i in (0, 1)]
        for b, n in enumerate(ends)
    ]
    rate = torch.tensor(rates)[:, None]
    admitted = [torch.rand(kv_heads, n, generator=generator) < rate for n in ends]
    at = [
        [admit[h, : max(n - window, 0)].nonzero()[:, 0] for h in range(kv_heads)]
        for admit, n in zip(admitted, ends, strict=True)
    ]
    counts = [[len(x) for x in row] for row in at]
    needed = sum(-(-n // page) for row in counts for n in row) + 1
    pool = make_pool(max(needed, 4), page, dim, dtype, slab_pages=4, first=first)
    table, held = fill_heads(pool, counts, seed=1, positions=at)
    pages = pool.flat()
    for b, row in enumerate(counts):
        for h, n in enumerate(row):
            slots = (table[b, h, torch.arange(n) // page].long(), torch.arange(n) % page)
            for store, source in zip((pages.k, pages.v), whole[b], strict=True):
                store[slots] = source[h, at[b][h].to(DEVICE)]
            pages.meta[slots] |= (torch.rand(n, generator=generator) < 0.5).to(pages.meta) << 30
    pool.fill(pages)
    recent = [
        torch.cat([w[i][:, f:] for w, f in zip(whole, firsts, strict=True)], 1) for i in (0, 1)
    ]
    flags = torch.cat([a[:, f:] for a, f in zip(admitted, firsts, strict=True)], 1)
    flags = (flags.to(torch.uint8) | MARKED).to(DEVICE)
    segments = make_segments(starts, queries, [n - f for n, f in zip(ends, firsts, strict=True)])
    # Queries as they leave a projection: [T, Hq, D], seen as [Hq, T, D].
    query = randn(sum(queries), kv_heads * group, dim, dtype=dtype, seed=3).transpose(0, 1)
    scale = dim**-0.5
    if op == "sparse":
        got = sparse.prefill_attention(
            query, *recent, flags, segments, pool.pages, Heads(table, held), window, scale
        )
    else:
        got = dense.dense_prefill(query, *recent, segments, pool.pages, table, scale)
    results = []
    for kind in (dtype, torch.float64):
        parts = []
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            i = torch.arange(start, end)[:, None]
            j = torch.arange(end)
            visible = (j <= i) & ((i - j < window) | admitted[b][:, None])
            visible = visible.repeat_interleave(group, 0).to(DEVICE)
            k, v = (x.to(kind).repeat_interleave(group, 0) for x in whole[b])
            q = query[:, segments.cu_q[b] : segments.cu_q[b + 1]].to(kind)
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
            parts.append(scores.softmax(-1) @ v)
        results.append(torch.cat(parts, 1))
    assert_within_budget(got, *results)
    assert op == "dense" or any(map(any, counts)) or max(ends) <= window or not any(rates)


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
