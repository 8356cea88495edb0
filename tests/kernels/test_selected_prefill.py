"""Attention over chosen blocks and columns, and XAttention's choice, checked op by op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy import PromptView, XAttention
from kvpolicy.kernels import antidiagonal, keys_at
from kvpolicy.kernels import selected_prefill as selected
from kvpolicy.ops import Heads, TileReads, tile_spans
from tests.support.kernels.plain import NOTHING, Asks, attention
from tests.support.kernels.pool import DEVICE, assert_within_budget, fill_heads, make_pool, randn
from tests.support.kernels.prefill import make_segments

CUDA = DEVICE.type == "cuda"


def check(
    starts: list[int], queries: list[int], *, tile: int, window: int = 9, each: bool = True,
    columns: int = 0, rates: tuple[float, float] = (0.6, 1.0), group: int = 2, dim: int = 16,
    page: int = 4, dtype: torch.dtype = torch.float32, asks: Asks = NOTHING, density: float = 0.4,
) -> None:  # fmt: skip
    """One call of ragged sequences against float64, within twice eager's error."""
    chance = torch.Generator().manual_seed(5)
    ends = [a + b for a, b in zip(starts, queries, strict=True)]
    whole = [
        [randn(2, n, dim, dtype=dtype, seed=7 * b + i) for i in (0, 1)] for b, n in enumerate(ends)
    ]
    kept = [torch.rand(2, n, generator=chance) < torch.tensor(rates)[:, None] for n in ends]
    at = [
        [x[h, : max(n - window, 0)].nonzero()[:, 0] for h in (0, 1)]
        for x, n in zip(kept, ends, strict=True)
    ]
    counts = [[len(x) for x in row] for row in at]
    pool = make_pool(
        sum(-(-n // page) for r in counts for n in r) + 4, page, dim, dtype, slab_pages=4
    )
    table, held = fill_heads(pool, counts, seed=1, positions=at)
    pages = pool.flat()
    for b, row in enumerate(counts):
        for h, n in enumerate(row):
            slots = (table[b, h, torch.arange(n) // page].long(), torch.arange(n) % page)
            for store, source in zip((pages.k, pages.v), whole[b], strict=True):
                store[slots] = source[h, at[b][h].to(DEVICE)]
    pool.fill(pages)
    firsts = [max(0, start - window) for start in starts]
    keys = [end - first for end, first in zip(ends, firsts, strict=True)]
    key, value = (
        torch.cat([x[i][:, f:] for x, f in zip(whole, firsts, strict=True)], 1) for i in (0, 1)
    )
    segments = make_segments(starts, queries, keys)
    heads = 2 * group
    query = randn(sum(queries), heads, dim, dtype=dtype, seed=3).transpose(0, 1)
    spans = tile_spans(segments, tile)
    tiles, width = sum(b - a for a, b in spans), max(b for _, b in spans)
    blocks = torch.rand(heads if each else 2, tiles, width, generator=chance) < density
    where = sets = None
    if columns:
        owner = [b for b, (a, c) in enumerate(spans) for _ in range(a, c)]
        sets = torch.tensor(owner, dtype=torch.int32, device=DEVICE)
        draw = torch.rand(len(blocks), len(spans), width * tile, generator=chance).argsort(-1)
        where = draw[..., :columns].sort(-1).values.int().to(DEVICE)
    got = selected.selected_prefill(
        query, key, value, segments, pool.pages, Heads(table, held), window, dim**-0.5,
        TileReads(tile, blocks.to(DEVICE), where, sets), **asks.options(heads),
    )  # fmt: skip

    def formula(kind: torch.dtype) -> Tensor:
        parts, sinks, first = [], asks.sinks(heads), 0
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            i, j = torch.arange(start, end)[:, None], torch.arange(end)
            own = blocks[:, first + i[:, 0] // tile - spans[b][0]][:, :, j // tile]
            first += spans[b][1] - spans[b][0]
            if where is not None:
                own = own | torch.isin(j, torch.empty(0)).expand_as(own)
                for h, row in enumerate(where[:, b].tolist()):
                    own[h, :, [x for x in row if x < end]] = True
            own = own.repeat_interleave(heads // len(own), 0)
            seen = (j <= i) & (
                (i - j < window) | (own & kept[b].repeat_interleave(group, 0)[:, None])
            )
            k, v = (x.to(kind).repeat_interleave(group, 0) for x in whole[b])
            asked = query[:, segments.cu_q[b] : segments.cu_q[b + 1]].to(kind)
            sink = None if sinks is None else sinks[:, None]
            parts.append(attention(asked, k, v, seen.to(DEVICE), dim**-0.5, asks, sink))
        return torch.cat(parts, 1)

    assert_within_budget(got, formula(dtype), formula(torch.float64))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("tile", "columns"),
    [
        (8, 7),
        *(pytest.param(n, c, marks=SLOW) for n, c in ((1, 0), (1, 7), (8, 0), (32, 0), (32, 7))),
    ],
)
def test_tiles_and_columns(tile: int, columns: int) -> None:
    check([21, 0], [30, 17] if tile > 1 else [6, 3], tile=tile, columns=columns)


@pytest.mark.parametrize("options", [
    {"each": False, "group": 3, "dim": 20, "page": 16},
    {"asks": Asks(softcap=2.0, sink=1.0), "dtype": torch.bfloat16},
    *(pytest.param(x, marks=SLOW) for x in (
        {"each": False},
        {"rates": (0.0, 0.0)},
        {"rates": (0.05, 1.0), "window": 1},
        {"density": 0.0, "columns": 3},
        {"density": 1.0, "window": 40},
        {"dtype": torch.bfloat16, "dim": 32},
        {"asks": Asks(softcap=2.0, sink=1.0)},
    )),
], ids=str)  # fmt: skip
def test_options(options: dict) -> None:
    check([21], [30], tile=8, **options)


def test_an_empty_sequence_and_a_token() -> None:
    check([40, 12, 3], [1, 0, 30], tile=8, columns=4)


def test_spans_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that do not fit in the scratch at once, and parts of tiles."""
    monkeypatch.setattr(selected, "_SCRATCH", 1)
    monkeypatch.setattr(selected, "choose_tile", lambda *_: selected.Tile(16, 16, 16, 4, 2))
    check([33], [40], tile=32, columns=5)


@pytest.mark.parametrize("softcap", [None, pytest.param(3.0, marks=SLOW)])
def test_the_choice_is_the_policys(softcap: float | None) -> None:
    """And does not depend on where a call begins: bit by bit."""
    key = randn(2, 90, 16, dtype=torch.float32, seed=1)
    query = randn(4, 90, 16, dtype=torch.float32, seed=2)
    present = torch.rand(2, 90, generator=torch.Generator().manual_seed(3)) < 0.7
    policy = XAttention(threshold=0.6, stride=4, tile=16)
    pool = make_pool(4, 4, 16, torch.float32, slab_pages=4)
    table, held = fill_heads(pool, [[0, 0]], seed=1)

    def choose(start: int) -> Tensor:
        segments = make_segments([start], [90 - start], [90])
        flags = present.to(DEVICE, torch.uint8)
        placed = keys_at.keys_at(key, flags, segments, pool.pages, Heads(table, held), 16)
        given = query[:, start:], *placed, segments, 0.25, 16, 4, 0.6
        return antidiagonal.antidiagonal_blocks(*given, softcap=softcap).cpu()

    host = (x.cpu().double() for x in (query, key.masked_fill(~present[..., None].to(DEVICE), 0)))
    asked, keys = host
    view = PromptView(0, range(2), asked, 0, keys, present, 0.25, softcap)
    assert torch.equal(choose(0), policy.prompt(view).blocks)
    assert torch.equal(choose(48), choose(0)[:, 3:])


def test_too_many_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="stride: wanted at least 2 for a tile of 512, got 1"):
        antidiagonal.antidiagonal_blocks(
            randn(2, 4, 16, dtype=torch.float32, seed=1), *[torch.zeros(1)] * 2,
            make_segments([0], [4], [4]), 1.0, 512, 1, 0.9,
        )  # fmt: skip


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match=r"selected_prefill: query is torch\.float64"):
        check([0], [3], tile=2, dtype=torch.float64)
