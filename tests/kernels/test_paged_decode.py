"""paged_decode against float64, within twice the error of eager low precision."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.kernels import paged_decode as module
from kvpolicy.kernels.paged_decode import paged_decode
from kvpolicy.ops import Heads, Ring
from tests.support.kernels.pool import (
    DEVICE,
    NAN,
    assert_within_budget,
    fill_heads,
    make_pool,
    randn,
)

CUDA = DEVICE.type == "cuda"


def ring_of(k: torch.Tensor, v: torch.Tensor) -> Ring:
    return Ring(k, v, torch.zeros(k.shape[:3], dtype=torch.uint8, device=DEVICE))


def oracle(query, k, v, visible, scale):
    """One query head: softmax over the visible keys, in the inputs' dtype."""
    scores = (query @ k[visible].T) * scale
    return scores.softmax(-1) @ v[visible]


def check(
    counts: list[list[int]],
    *,
    group: int,
    dim: int,
    dtype: torch.dtype,
    page: int = 16,
    window: int = 5,
    slots: int = 9,
    lengths: list[int] | None = None,
    active: list[bool] | None = None,
    selected: torch.Tensor | None = None,
    first: str = "low",
) -> None:
    batch, kv_heads = len(counts), len(counts[0])
    needed = sum(-(-n // page) for row in counts for n in row) + 1
    slab_pages = max(2, 1 << (max(needed // 3, 1).bit_length() - 1))
    pool = make_pool(needed, page, dim, dtype, slab_pages=slab_pages, first=first)
    table, held = fill_heads(pool, counts, seed=1)
    lengths = lengths or [max(row) + window for row in counts]
    alive = active or [True] * batch
    query = randn(batch, kv_heads * group, dim, dtype=dtype, seed=2)
    ring_k, ring_v = (randn(batch, kv_heads, slots, dim, dtype=dtype, seed=s) for s in (3, 4))
    back = (torch.tensor(lengths)[:, None] - torch.arange(slots)) % slots
    near = (back < window) & (back <= torch.tensor(lengths)[:, None])
    for ring in (ring_k, ring_v):
        ring.masked_fill_(~near.to(DEVICE)[:, None, :, None], NAN)
    scale = dim**-0.5
    got = paged_decode(
        query, pool.pages, Heads(table, held), ring_of(ring_k, ring_v),
        torch.tensor(lengths, device=DEVICE), torch.tensor(alive, device=DEVICE), window, scale,
        selected=selected,
    )  # fmt: skip
    pages = pool.flat()
    results = []
    for kind in (dtype, torch.float64):
        out = torch.zeros(batch, kv_heads * group, dim, dtype=kind, device=DEVICE)
        for b in range(batch):
            for head in range(kv_heads * group if alive[b] else 0):
                h = head // group
                n = counts[b][h]
                ids = table[b, h, : -(-n // page)].long()
                seen = torch.arange(len(ids) * page, device=DEVICE) < n
                if selected is not None:
                    chosen = selected[b, head * selected.shape[1] // (kv_heads * group)]
                    seen &= torch.isin(torch.arange(len(seen), device=DEVICE) // page, chosen)
                k = torch.cat([pages.k[ids].flatten(0, 1), ring_k[b, h]]).to(kind)
                v = torch.cat([pages.v[ids].flatten(0, 1), ring_v[b, h]]).to(kind)
                visible = torch.cat([seen, near[b].to(DEVICE)])
                out[b, head] = oracle(query[b, head].to(kind), k, v, visible, scale)
        results.append(out)
    assert_within_budget(got, *results)
    for b in range(batch):
        assert alive[b] or not got[b].any()


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
