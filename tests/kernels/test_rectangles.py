"""Rectangles of a prompt left to a dense kernel: which ones, their result, and when they pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.kernels import _flash, prefill_gather
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.kernels.prefill_gather import Rectangles, Tile, gather
from kvpolicy.ops import Heads
from tests.support.kernels.dense import Dense
from tests.support.kernels.plain import NOTHING, Asks
from tests.support.kernels.pool import CUDA, DEVICE, fill_heads, make_pool
from tests.support.kernels.prefill import check, make_segments


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Dense:
    """A stand-in for the dense kernel, which gets every rectangle of 16 rows and more."""
    found = Dense()
    rectangles = Rectangles(found, queries=64, spare=8, least=16, average=0, work=0)
    monkeypatch.setattr(sparse, "choose_rectangles", lambda *_: rectangles)
    return found


def small(monkeypatch: pytest.MonkeyPatch, keys: int = 16, descriptors: bool = False) -> None:
    """Small tiles, so that short prompts have many."""
    tile = Tile(64 if CUDA else 32, keys, 4, 2, descriptors)
    monkeypatch.setattr(sparse, "choose_tile", lambda *_: tile)


@pytest.mark.parametrize(
    ("starts", "queries", "rates", "dtype"),
    [
        ([0], [165], (0.9, 0.3), torch.bfloat16),
        ([0], [130], (0.6, 0.0), torch.float32),  # a head without rows
        ([120, 0, 40, 0], [70, 0, 68, 3], (0.7, 0.3), torch.float32),
        ([301], [65], (0.2, 1.0), torch.float16),
    ],
)
def test_ragged(
    starts: list[int],
    queries: list[int],
    rates: tuple[float, float],
    dtype: torch.dtype,
    dense: Dense,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small(monkeypatch)
    check(starts, queries, window=9, rates=rates, dtype=dtype, group=1)
    assert 0 < sum(map(bool, dense.rows)) < len(dense.rows) or all(s > 64 for s in starts)


@pytest.mark.parametrize(
    ("group", "dim", "keys", "descriptors"),
    [(2, 64, 16, True), (3, 80, 32, False), (8, 128, 32, True), (4, 128, 32, False)],
)
def test_groups_and_dims(
    group: int,
    dim: int,
    keys: int,
    descriptors: bool,
    dense: Dense,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small(monkeypatch, keys, descriptors)
    check(
        [60], [66], window=5, group=group, kv_heads=1, dim=dim, rates=(0.9,),
        dtype=torch.bfloat16, first="high",
    )  # fmt: skip
    assert any(dense.rows)


def test_a_softcap_and_sinks(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rectangle's kernel caps logits; what goes on from it caps them too and adds the sinks."""
    small(monkeypatch)
    dense.softcap = 3.0
    asks = Asks(softcap=3.0, sink=5.0, sharp=3.0)
    check([60], [66], window=5, rates=(0.9, 0.3), asks=asks)
    assert any(dense.rows)


def test_nothing_to_take(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    none = Rectangles(dense, queries=64, spare=0, least=500, average=0, work=0)
    monkeypatch.setattr(sparse, "choose_rectangles", lambda *_: none)
    check([0], [90], window=5, rates=(0.9, 0.1))
    assert dense.rows and not any(dense.rows)


@pytest.mark.parametrize("spare", [0, 40])
def test_a_rectangle_is_what_all_of_its_queries_see(spare: int) -> None:
    starts, queries, window, keys, span, least = [0, 60], [150, 70], 10, 16, 64, 32
    generator = torch.Generator().manual_seed(3)
    at = [
        [(torch.rand(s + n - window, generator=generator) < p).nonzero()[:, 0] for p in (0.8, 0.3)]
        for s, n in zip(starts, queries, strict=True)
    ]
    counts = [[len(x) for x in row] for row in at]
    pool = make_pool(60, 16, 16, torch.float32, slab_pages=4)
    table, held = fill_heads(pool, counts, seed=1, positions=at)
    segments = make_segments(starts, queries, queries)
    rectangles = Rectangles(Dense(), span, spare, least, average=0, work=0)
    heads = Heads(table, held)
    far = gather(segments, pool.pages, heads, window, Tile(32, keys, 4, 2), 1, rectangles)
    assert far is not None and far.plan is not None
    taken, bounds = [], []
    for h in (0, 1):
        row, tiles = 0, []
        for b, (start, n) in enumerate(zip(starts, queries, strict=True)):
            before = sum(-(-c // 128) * 128 for line in counts[:b] for c in line)
            before += -(-counts[b][0] // 128) * 128 * h
            for first in range(0, n, span):
                rows = int((at[b][h] < start + first - window + 1).sum())
                rows = max(min(rows, counts[b][h] - spare), 0)
                rows = rows if rows >= least else 0
                size = min(span, n - first)
                bounds.append([h * sum(queries) + row + first, before, size if rows else 0, rows])
                tiles += [rows] * -(-size // 32)
            row += n
        taken.append(tiles)
    assert far.plan.taken.tolist() == taken
    assert far.plan.bounds[:, :-1].T.tolist() == bounds
    assert far.plan.bounds[:2, -1].tolist() == [2 * sum(queries), len(far.k)]
    assert sum(b[3] > 0 for b in bounds) >= 4


@pytest.mark.parametrize(
    ("start", "queries", "held", "pays"),
    [
        (0, 131072, [32700] * 8, True),
        (0, 131072, [13100] * 8, True),
        (0, 32768, [8128] * 8, True),
        (0, 32768, [3251] * 8, True),
        (0, 32768, [2000] * 8, False),
        (0, 131072, [130816] * 2 + [2616] * 6, True),
        (0, 131072, [64] * 8, False),
        (122880, 8192, [32700] * 8, True),
        (122880, 256, [32700] * 8, False),  # too short for another launch
        (0, 8192, [1984] * 8, False),
        (0, 200, [0] * 8, False),
    ],
)
def test_when_rectangles_pay(start: int, queries: int, held: list[int], pays: bool) -> None:
    segments = make_segments([start], [queries], [queries])
    assert prefill_gather._pays(Rectangles(Dense()), segments, [held], 256, 4) is pays


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_flash_on_a_device(
    softcap: float | None, dim: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.empty(1, 1, dim, dtype=torch.bfloat16, device=DEVICE)
    found = _flash.find_varlen(query, softcap)
    if found is None:
        pytest.skip("needs FlashAttention-3 (with softcap) and a Hopper device")
    calls = []

    def attend(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args[6].tolist())
        return found(*args)

    tile = sparse.AFTER if dim <= 128 else None
    rectangles = Rectangles(attend, queries=384, least=256, average=0, work=0, tile=tile)
    monkeypatch.setattr(sparse, "choose_rectangles", lambda *_: rectangles)
    check(
        [1500, 0, 0], [777, 1100, 5], window=256, dim=dim, dtype=torch.bfloat16, group=group,
        rates=(0.9, 0.3), asks=NOTHING if softcap is None else Asks(softcap=softcap, sharp=3.0),
    )  # fmt: skip
    assert any(calls[0]) and not all(calls[0])
