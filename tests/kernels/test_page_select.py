"""Page choice: top_pages equals the reference, quest_select takes the pages of a float64 bound."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import page_select
from kvpolicy.ops import Heads
from tests.support.kernels.pool import DEVICE, fill_heads, make_pool, randn

CUDA = DEVICE.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "budget", "first", "last"),
    [
        (1, 1, 0, 0),
        (7, 3, 1, 1),
        (150, 9, 0, 2),
        (150, 64, 4, 0),
        (5, 8, 1, 1),
        (20, 2, 1, 2),
        (20, 2, 0, 5),
        (9, 3, 4, 2),
        (150, 9, 1, -1),
        (20, 1, 0, -1),
    ],
)
def test_top_pages(width: int, budget: int, first: int, last: int, dtype: torch.dtype) -> None:
    size = 16
    counts = torch.tensor(
        [[width * size, 0], [max(width * size // 2 - 3, 0), 1]], dtype=torch.int32, device=DEVICE
    )
    scores = randn(2, 4, width, dtype=torch.float32, seed=width)
    scores[:, 1] = scores[:, 1].round()  # many ties
    scores[:, 2] *= -1e-30
    scores[0, 3] = torch.tensor([0.0, -0.0], device=DEVICE).repeat(width)[:width]
    scores = scores.to(dtype)
    got = page_select.top_pages(scores, counts, size, budget, first, last)
    want = reference.top_pages(scores, counts, size, budget, first, last)
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("budget", "first", "last"),
    [(5, 2, 3), (300, 2, 3), (4, 0, 300), (200, 0, 0), (3, 3, 2), (3, 1, -1)],
)
def test_top_pages_over_several_blocks(
    budget: int, first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_select, "_MAX_BLOCK", 128)
    counts = torch.tensor([[700 * 4 - 1]], dtype=torch.int32, device=DEVICE)
    scores = randn(1, 1, 800, dtype=torch.float32, seed=1).round(decimals=1)
    scores[..., 700:] = float("nan")
    got = page_select.top_pages(scores, counts, 4, budget, first, last)
    want = reference.top_pages(scores.nan_to_num(), counts, 4, budget, first, last)
    assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(18))
def test_top_pages_of_any_scores(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 3:
        monkeypatch.setattr(page_select, "_ONE_SEARCH", 1)  # by groups where they help at all
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    width, size = 1 + draw(300), 1 + draw(5)
    budget, first, last = 1 + draw(40), draw(6), draw(7) - 1
    counts = torch.randint(width * size + 1, (2, 2), generator=generator).int().to(DEVICE)
    kinds = torch.tensor([0.0, -0.0, 1e-40, -1e30, 3e38, float("inf"), -float("inf")])
    scores = torch.randn(2, 4, width, generator=generator) * 10.0 ** draw(9)
    special = kinds[torch.randint(len(kinds), scores.shape, generator=generator)]
    rare = torch.rand(scores.shape, generator=generator) < 0.1 * draw(10)
    scores = torch.where(rare, special, scores).to(DEVICE)
    got = page_select.top_pages(scores, counts, size, budget, first, last)
    assert torch.equal(got, reference.top_pages(scores, counts, size, budget, first, last))


SPREADS = {
    "normal": lambda x: x,
    "one binade": lambda x: 1 + x.abs() * 1e-5,
    "one outlier": lambda x: torch.where(x == x.amax(-1, keepdim=True), 3e38, x),
    "heavy tails": lambda x: x.sign() * (8 * x.abs()).exp(),
    "any magnitude": lambda x: x.sign() * 10 ** (20 * x),
    "two clusters": lambda x: x + 30 * (x.frac().abs() < 0.03),
    "few values": lambda x: x.round(),
    "equal": lambda x: x * 0,
    "infinite": lambda x: torch.where(x.abs() < 1, x, x * float("inf")),
    "no hope": lambda x: torch.where(x < 2.5, -float("inf"), x),
    "rising": lambda x: x.sort().values,
    "16 bits": lambda x: (40 + 8 * x).bfloat16().float(),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("budget", "last"), [(60, 0), (240, 1), (256, 2), (1000, 1), (60, -1)])
def test_top_pages_of_a_long_head(spread: str, budget: int, last: int) -> None:
    width = 2500
    counts = torch.tensor([[width, 1801]], dtype=torch.int32, device=DEVICE)
    scores = SPREADS[spread](randn(1, 2, width, dtype=torch.float32, seed=budget))
    scores[0, 1, 1801:] = 9e37  # never written
    got = page_select.top_pages(scores, counts, 1, budget, 1, last)
    assert torch.equal(got, reference.top_pages(scores, counts, 1, budget, 1, last))


def test_more_trailing_pages_than_the_budget() -> None:
    """A first page that is not among them makes no group certain."""
    counts = torch.full((1, 24), 112, dtype=torch.int32, device=DEVICE)
    args = (randn(1, 24, 4096, dtype=torch.float32, seed=2), counts, 1, 4, 1, 100)
    assert torch.equal(page_select.top_pages(*args), reference.top_pages(*args))


@pytest.mark.parametrize("better", [0, 12_000])
def test_a_full_block_of_equal_scores(better: int) -> None:
    width = page_select._MAX_BLOCK
    counts = torch.tensor([[width]], dtype=torch.int32, device=DEVICE)
    scores = torch.ones(1, 1, width, device=DEVICE)
    scores[..., :better] = 2
    got = page_select.top_pages(scores, counts, 1, width - 1, 0, 1)
    pages = list(range(width - 2)) + [width - 1]
    assert got[0, 0].tolist() == pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", ["max", "mean", "each"])
@pytest.mark.parametrize(
    ("heads", "dim", "first"), [(3, 80, "low"), (8, 64, "high"), (1, 16, "low"), (2, 320, "low")]
)
def test_quest_select(heads: int, dim: int, first: str, group: str, dtype: torch.dtype) -> None:
    page, budget = 4, 5
    lengths = [[71, 0], [9, 45]]
    pool = make_pool(48, page, dim, dtype, slab_pages=16, width=2 * dim, first=first)
    table, counts = fill_heads(pool, lengths, seed=2)
    query = randn(2, 2 * heads, dim, dtype=dtype, seed=3)
    got = page_select.quest_select(pool.pages, Heads(table, counts), query, budget, group, 1, 1)
    extent = pool.flat().summary[table.long()].nan_to_num().double().view(2, 2, 1, -1, 2, dim)
    q = query.double().view(2, 2, heads, 1, dim)
    bound = torch.maximum(q * extent[..., 0, :], q * extent[..., 1, :]).sum(-1)
    bound = {"max": bound.amax(2), "mean": bound.mean(2), "each": bound.flatten(1, 2)}[group]
    want = reference.top_pages(bound, counts, page, budget, 1, 1)
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("width", [6250, 70000])
def test_many_pages_on_a_device(width: int) -> None:
    counts = torch.tensor([[width * 16, width * 8 + 5]], dtype=torch.int32, device=DEVICE)
    scores = randn(1, 8, width, dtype=torch.float32, seed=1)
    got = page_select.top_pages(scores, counts, 16, 256, 1, 2)
    assert torch.equal(got, reference.top_pages(scores, counts, 16, 256, 1, 2))
