"""append, decode_write: equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import cache_write
from kvpolicy.ops import ADMITTED, MARKED, POSITION_MASK, Heads, Ring
from tests.support.kernels.pool import DEVICE, Pool, fill_heads, make_pool, randn


def stored(pool: Pool, table: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    """k, v and meta of every head's tokens, one after another."""
    pages = pool.flat()
    size = pages.k.shape[1]
    out: list[list[torch.Tensor]] = [[], [], []]
    for b, h in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        n = int(counts[b, h])
        ids = table[b, h, : -(-n // size)].long()
        for part, store in zip(out, pages[:3], strict=True):
            part.append(store[ids].flatten(0, 1)[:n])
    return [torch.cat(part) for part in out]


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype", "first"),
    [
        (1, 64, torch.bfloat16, "low"),
        (65, 80, torch.float32, "high"),
        (37, 16, torch.float16, "low"),
    ],
)
def test_append(tokens: int, dim: int, dtype: torch.dtype, first: str) -> None:
    pool = make_pool(40, 16, dim, dtype, slab_pages=16, first=first)
    table, counts = fill_heads(pool, [[3, 0], [17, 16]], seed=1)
    size = 16
    generator = torch.Generator().manual_seed(2)
    rows = (torch.arange(tokens) >= tokens // 2).int()
    dest = torch.full((2, tokens), -1, dtype=torch.int32)
    grown, table, height = counts.cpu().clone(), table.cpu(), int(pool.pages.top)
    table = torch.cat([table, torch.zeros(2, 2, 8, dtype=torch.int32)], -1)
    for h in range(2):
        for t in range(tokens):
            if torch.rand((), generator=generator) < 0.6:
                b, n = int(rows[t]), int(grown[int(rows[t]), h])
                if n % size == 0:
                    height -= 1
                    table[b, h, n // size] = pool.pages.free[height]
                dest[h, t] = n
                grown[b, h] += 1
    table, dest, rows = table.to(DEVICE), dest.to(DEVICE), rows.to(DEVICE)
    # Keys as they leave a projection: [T, Hkv, D], seen as [Hkv, T, D].
    key = randn(tokens, 2, dim, dtype=dtype, seed=3).transpose(0, 1)
    value = randn(2, tokens, dim, dtype=dtype, seed=4)
    meta = torch.arange(2 * tokens, dtype=torch.int32, device=DEVICE).view(2, tokens)
    want = pool.flat()
    reference.append(want, table, key, value, meta, dest, rows)
    cache_write.append(pool.pages, table, key, value, meta, dest, rows)
    got = pool.flat()
    for name in ("k", "v", "meta"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(
    ("window", "slots", "page", "dim", "minmax"),
    [(1, 1, 16, 16, True), (3, 3, 4, 80, True), (4, 7, 16, 64, False)],
)
def test_decode_write_over_many_steps(
    window: int, slots: int, page: int, dim: int, minmax: bool
) -> None:
    batch, heads, steps = 3, 2, 12
    dtype = torch.bfloat16
    pool = make_pool(32, page, dim, dtype, slab_pages=8, width=2 * dim, first="high")
    table, counts = fill_heads(pool, [[page - 1, 0], [0, 5], [1, 1]], seed=5)
    table = torch.cat([table, torch.zeros(batch, heads, 8, dtype=torch.int32, device=DEVICE)], -1)
    for *_, summary in pool.extents:  # free pages keep the bounds of tokens that they held before
        summary.nan_to_num_(100.0)
    want = pool.flat()
    # The reference combines what the page held; the poison of a page's rest is not compared.
    ring = [randn(batch, heads, slots, dim, dtype=dtype, seed=s) for s in (6, 7)]
    flags = torch.zeros(batch, heads, slots, dtype=torch.uint8, device=DEVICE)
    lengths = torch.tensor([0, 2, 40], device=DEVICE)
    active = torch.tensor([True, True, True], device=DEVICE)
    ours = [table, counts, *ring, flags]
    theirs = [t.clone() for t in ours]
    taken = int(pool.pages.top)
    for step in range(steps):
        if step == 7:
            active = torch.tensor([True, False, True], device=DEVICE)
        key, value = (
            randn(batch, heads, dim, dtype=dtype, seed=100 + 2 * step + i) for i in (0, 1)
        )
        bits = torch.randint(0, 4, (batch, heads), generator=torch.Generator().manual_seed(step))
        bits = bits.to(torch.uint8).to(DEVICE)
        given = (key, value, bits, lengths, active, window)
        cache_write.decode_write(
            pool.pages, Heads(*ours[:2]), Ring(*ours[2:]), *given, minmax=minmax
        )
        reference.decode_write(want, Heads(*theirs[:2]), Ring(*theirs[2:]), *given, minmax=minmax)
        lengths = lengths + active
    for got, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    flat = Pool(want, [(want.k, want.v, want.meta)])
    for got, expected in zip(
        stored(pool, ours[0], ours[1]), stored(flat, theirs[0], theirs[1]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert int(pool.pages.top) == int(want.top) < taken
    assert int(pool.pages.refs.sum()) == int(want.refs.sum())
    held = ours[0][ours[0] > 0].long()
    assert held.unique().numel() == held.numel()
    assert (pool.pages.refs[held] == 1).all()
    if minmax:
        pages = pool.flat()
        for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
            n = int(counts[b, h])
            for number in range(-(-n // page)):
                id_ = int(ours[0][b, h, number])
                keys = pages.k[id_, : min(page, n - number * page)]
                bounds = torch.cat([keys.amin(0), keys.amax(0)])
                torch.testing.assert_close(pages.summary[id_], bounds, rtol=0, atol=0)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bits", [0, MARKED, ADMITTED | MARKED])
def test_decode_write_flags_and_queries(given: bool, bits: int) -> None:
    batch, heads, group, slots, dim = 3, 2, 3, 4, 20
    pool = make_pool(4, 4, dim, torch.float16, slab_pages=4)
    table = torch.zeros(batch, heads, 2, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(batch, heads, dtype=torch.int32, device=DEVICE)
    ring = [torch.zeros(batch, heads, slots, dim, dtype=torch.float16, device=DEVICE)] * 2
    flags = torch.full((batch, heads, slots), 7, dtype=torch.uint8, device=DEVICE)
    key = randn(batch, heads, dim, dtype=torch.float16, seed=1)
    # Decisions as an admission returns them: [Hkv, B], seen as [B, Hkv].
    decided = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.uint8, device=DEVICE).T
    query = randn(heads * group, batch, dim, dtype=torch.float16, seed=2).transpose(0, 1)
    queries = torch.full((batch, heads * group, 5, dim), 9, dtype=torch.float16, device=DEVICE)
    lengths = torch.tensor([0, 3, 13], device=DEVICE)
    active = torch.tensor([True, False, True], device=DEVICE)
    for write, pages in (
        (cache_write.decode_write, pool.pages),
        (reference.decode_write, pool.flat()),
    ):
        out, seen = flags.clone(), queries.clone()
        write(
            pages, Heads(table, counts), Ring(*(x.clone() for x in ring), out), key, key,
            decided if given else None, lengths, active, 20, bits=bits, query=query, queries=seen,
        )  # fmt: skip
        for b in (0, 1, 2):
            expected, wanted = flags[b].clone(), queries[b].clone()
            if active[b]:
                expected[:, lengths[b] % slots] = (decided[b] if given else 0) | bits
                wanted[:, lengths[b] % 5] = query[b]
            assert torch.equal(out[b], expected) and torch.equal(seen[b], wanted)


def test_decode_write_marks_and_empty_stack() -> None:
    pool = make_pool(4, 4, 16, torch.float32, slab_pages=4)
    pool.pages.top.fill_(0)
    table = torch.zeros(1, 1, 2, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    ring = [randn(1, 1, 2, 16, dtype=torch.float32, seed=s) for s in (1, 2)]
    flags = torch.full((1, 1, 2), ADMITTED | MARKED, dtype=torch.uint8, device=DEVICE)
    new = randn(1, 1, 16, dtype=torch.float32, seed=3)
    lengths = torch.tensor([5], device=DEVICE)
    active = torch.ones(1, dtype=torch.bool, device=DEVICE)
    before = pool.flat()
    cache_write.decode_write(
        pool.pages,
        Heads(table, counts),
        Ring(*ring, flags),
        new,
        new,
        flags[:, :, 0].clone(),
        lengths,
        active,
        2,
    )
    after = pool.flat()
    torch.testing.assert_close(after.k[1:], before.k[1:], rtol=0, atol=0, equal_nan=True)
    assert int(after.refs[0]) == 1 and not after.refs[1:].any()
    assert int(after.meta[0, 0]) & POSITION_MASK == 3 and int(after.meta[0, 0]) > POSITION_MASK


def test_written_in_place_wants_dense_rows() -> None:
    pool = make_pool(4, 4, 16, torch.float32, slab_pages=4)
    ring = torch.zeros(1, 1, 16, 2, device=DEVICE).transpose(2, 3)
    zero = torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE)
    new = torch.zeros(1, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="ring_k wants a contiguous last dimension"):
        cache_write.decode_write(
            pool.pages, Heads(zero, zero[0]), Ring(ring, ring, zero.byte()), new, new,
            zero[0].byte(),
            torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE), 1,
        )  # fmt: skip
