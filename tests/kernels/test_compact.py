"""Reading tokens by number and moving kept ones equal the reference, wherever pages lie."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import compact
from kvpolicy.ops import Pages
from tests.support.kernels.pool import DEVICE, fill_heads, make_pool


@pytest.mark.parametrize(
    ("page", "dim", "dtype", "first"),
    [
        (4, 80, torch.float32, "low"),
        (16, 64, torch.bfloat16, "high"),
        (4, 24, torch.float16, "low"),
    ],
)
def test_read_tokens(page: int, dim: int, dtype: torch.dtype, first: str) -> None:
    pool = make_pool(48, page, dim, dtype, slab_pages=4, first=first)
    table, counts = fill_heads(pool, [[40, 0, 7], [1, 33, 39]], seed=1)
    rng = torch.Generator().manual_seed(3)
    source = (torch.rand(2, 3, 37, generator=rng) * counts.cpu()[..., None]).int()
    source[torch.rand(source.shape, generator=rng) < 0.2] = -1
    source[0, 1] = -1
    source = source.to(DEVICE)
    wide = torch.full((2, 3, 50), -7, dtype=torch.int32, device=DEVICE)
    wide[..., :37] = source
    got = compact.read_tokens(pool.pages, table, wide[..., :37])
    flat = pool.flat()
    want = reference.read_tokens(flat._replace(k=flat.k.nan_to_num(), v=flat.v.nan_to_num()),
                                 table, source)  # fmt: skip
    for b, h, i in [(0, 0, 3), (1, 1, 20), (1, 2, 36), (0, 2, 9)]:
        token = int(source[b, h, i])
        if token >= 0:
            page_id, slot = int(table[b, h, token // page]), token % page
            assert torch.equal(want[0][b, h, i], flat.k[page_id, slot])
            assert torch.equal(want[1][b, h, i], flat.v[page_id, slot])
            assert want[2][b, h, i] == flat.meta[page_id, slot]
        else:
            assert not want[0][b, h, i].any() and not want[2][b, h, i]
    assert (source >= 0).sum() > 60
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_no_tokens() -> None:
    pool = make_pool(4, 4, 16, torch.float32, slab_pages=4)
    table = torch.zeros(1, 2, 1, dtype=torch.int32, device=DEVICE)
    none = torch.zeros(1, 2, 0, dtype=torch.int32, device=DEVICE)
    for op in (compact.read_tokens, reference.read_tokens):
        k, v, meta = op(pool.pages, table, none)
        assert k.shape == v.shape == (1, 2, 0, 16) and meta.shape == (1, 2, 0)


def kept_by_hand(pages: Pages, old: torch.Tensor, keep: list[torch.Tensor]) -> list[list]:
    """K, v and meta of the tokens that stay, head by head."""
    size = pages.k.shape[1]
    return [
        [
            [store[int(table[n // size]), n % size] for n in mask.nonzero().flatten().tolist()]
            for store in (pages.k, pages.v, pages.meta)
        ]
        for table, mask in zip(old, keep, strict=True)
    ]


@pytest.mark.parametrize(
    ("page", "dim", "dtype", "first"),
    [
        (4, 80, torch.float32, "low"),
        (16, 64, torch.bfloat16, "high"),
        (1, 24, torch.float16, "low"),
        (2, 256, torch.float32, "high"),
    ],
)
@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_move_kept(page: int, dim: int, dtype: torch.dtype, first: str, chance: float) -> None:
    """Long, empty and short heads; one whose pages are shared, one that is left alone."""
    lengths = [[150, 0, 7, 64], [1, 65, 129, 40]]
    pages_in_use = sum(-(-n // page) for row in lengths for n in row)
    pool = make_pool(
        pages_in_use + -(-129 // page) + 2, page, dim, dtype, slab_pages=4, first=first
    )
    table, counts = fill_heads(pool, lengths, seed=1)
    old, flat = table.flatten(0, 1), pool.flat()
    rng = torch.Generator().manual_seed(page)
    keep = [torch.rand(n, generator=rng) < chance for row in lengths for n in row]
    keep[3][:], keep[7][:] = True, False
    keep[6][:20] = True  # a prefix that does not move
    # Head 6 shares its pages: what it keeps goes to fresh ones. Head 4 is left alone.
    stays = -(-int(keep[6].sum()) // page)
    new, fresh = old.clone(), int(pool.pages.top)
    new[6, :stays] = pool.pages.free[fresh - stays : fresh]
    new[6, stays:] = 0
    amounts = counts.flatten().clone()
    amounts[4] = 0
    pad = torch.ones(5, dtype=torch.bool)  # masks lie apart, in any order
    order = [5, 2, 7, 0, 6, 1, 3, 4]
    starts, parts = torch.zeros(8, dtype=torch.int64), []
    for head in order:
        starts[head] = sum(map(len, parts)) + 5
        parts += [pad, keep[head]]
    given = (old, new, torch.cat(parts).to(DEVICE), starts.to(DEVICE), amounts)
    wanted = kept_by_hand(flat, old.cpu(), keep)
    untouched = {p: [x[p].clone() for x in (flat.k, flat.v, flat.meta)] for p in old[6].tolist()}
    plain = pool.flat()
    compact.move_kept(pool.pages, *given)
    reference.move_kept(plain, *given)
    for after in (pool.flat(), plain):
        for head, want in enumerate(wanted):
            if head == 4:
                continue
            for store, rows in zip((after.k, after.v, after.meta), want, strict=True):
                for n, row in enumerate(rows):
                    assert torch.equal(store[int(new[head, n // page]), n % page], row)
        assert torch.equal(after.k[old[4, 0].item(), 0], flat.k[old[4, 0].item(), 0])
        for p, before in untouched.items():
            for one, other in zip((after.k, after.v, after.meta), before, strict=True):
                assert torch.equal(one[p].nan_to_num(), other.nan_to_num())
    for one, other in zip(pool.flat()[:3], plain[:3], strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_no_heads_to_move() -> None:
    pool = make_pool(4, 4, 16, torch.float32, slab_pages=4)
    before = pool.flat()
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    table = torch.zeros(0, 3, dtype=torch.int32, device=DEVICE)
    for op in (compact.move_kept, reference.move_kept):
        op(pool.pages, table, table, none.bool(), none, none.int())
    assert torch.equal(pool.flat().k.nan_to_num(), before.k.nan_to_num())
