"""Reading tokens by number equals the reference, wherever their pages lie."""

from __future__ import annotations

import pytest
import torch
from pool import DEVICE, fill_heads, make_pool

from kvpolicy import reference
from kvpolicy.kernels import compact


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
