"""count_leaving, write_leaving: a loop over tokens decides; equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import prompt_write
from kvpolicy.ops import ADMITTED, MARKED, POSITION_BITS, Heads, Segments
from tests.support.kernels.pool import DEVICE, fill_heads, make_pool, randn


def make_segments(old: list[int], new: list[int], start: list[int]) -> Segments:
    """Sequences with `old` tokens of the ring before `new` ones, the first of them at `start`."""
    cu_q, cu_k = [0], [0]
    for ring, fresh in zip(old, new, strict=True):
        cu_q.append(cu_q[-1] + fresh)
        cu_k.append(cu_k[-1] + (ring + fresh if fresh else 0))
    on = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu_q, cu_k, start)]
    return Segments(tuple(cu_q), tuple(cu_k), tuple(start), *on)


@pytest.mark.parametrize(
    ("old", "new", "start", "held", "window", "page", "dim", "dtype"),
    [
        ([0], [300], [0], [[0, 0]], 17, 16, 16, torch.bfloat16),
        ([5, 5, 5], [1, 0, 70], [9, 40, 5], [[3, 0], [5, 2], [0, 4]], 5, 4, 80, torch.float32),
        ([0, 64], [66, 200], [0, 70], [[0, 0], [6, 1]], 64, 16, 20, torch.float16),
        ([2, 0], [30, 8], [2, 0], [[0, 2], [0, 0]], 3, 64, 16, torch.float32),
    ],
    ids=["one", "ragged", "chunks", "large pages"],
)
@pytest.mark.parametrize("rate", [0.4, 1.0, 0.0])
def test_leaving_tokens_go_to_pages(
    old: list[int], new: list[int], start: list[int], held: list[list[int]], window: int, page: int,
    dim: int, dtype: torch.dtype, rate: float,
) -> None:  # fmt: skip
    segments = make_segments(old, new, start)
    batch, heads, tokens = len(held), 2, segments.cu_k[-1]
    pool = make_pool(200, page, dim, dtype, slab_pages=32, first="high")
    table, counts = fill_heads(pool, held, seed=1)
    spare = torch.zeros(batch, heads, 80, dtype=torch.int32, device=DEVICE)
    ours = torch.cat([table, spare], -1)
    theirs = ours.clone()
    # Keys as they leave a projection: [T, Hkv, D], seen as [Hkv, T, D].
    key = randn(tokens, heads, dim, dtype=dtype, seed=3).transpose(0, 1)
    value = randn(heads, tokens, dim, dtype=dtype, seed=4)
    rng = torch.Generator().manual_seed(5)
    flags = (torch.rand(heads, tokens, generator=rng) < rate) * ADMITTED
    flags = (flags + torch.randint(2, (heads, tokens), generator=rng) * MARKED).byte().to(DEVICE)

    given, found = (flags, counts, segments, window, page), {}
    for name, ops in (("kernel", prompt_write), ("reference", reference)):
        found[name] = ops.count_leaving(*given)
    for got, want in zip(found["kernel"][:2], found["reference"][:2], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    taken = int(found["kernel"][1].sum())
    top = int(pool.pages.top)
    ids = pool.pages.free[top - taken : top].flip(0)
    written = (key, value, flags, segments, window)
    flat = pool.flat()
    reference.write_leaving(flat, Heads(theirs, counts.clone()), *written, *found["reference"])
    prompt_write.write_leaving(pool.pages, Heads(ours, counts), *written, *found["kernel"])
    got = pool.flat()
    assert int(got.top) == int(flat.top) == top - taken and torch.equal(got.refs, flat.refs)
    assert torch.equal(ours, theirs) and torch.equal(counts, found["kernel"][0])
    column = torch.arange(ours.shape[2], device=DEVICE)
    ends = torch.zeros(len(got.k), dtype=torch.int64, device=DEVICE)
    ends[ours.long()] = (counts[..., None] - column * page).clamp(0, page)
    slots = torch.arange(page, device=DEVICE)
    for name in ("k", "v", "meta"):
        stored = slots < ends[:, None]
        assert torch.equal(getattr(got, name)[stored], getattr(flat, name)[stored])

    place, unused = [n for row in held for n in row], iter(ids.tolist())
    for b in range(batch):
        first, span = segments.cu_k[b], segments.cu_k[b + 1] - segments.cu_k[b]
        for h in range(heads):
            n = place[b * heads + h]
            for i in range(span - window):
                if not int(flags[h, first + i]) & ADMITTED:
                    continue
                number = int(ours[b, h, n // page])
                if n % page == 0:
                    assert number == next(unused)
                assert torch.equal(got.k[number, n % page], key[h, first + i])
                assert torch.equal(got.v[number, n % page], value[h, first + i])
                at = start[b] + new[b] - span + i
                mark = int(flags[h, first + i]) // MARKED
                assert int(got.meta[number, n % page]) == at + (mark << POSITION_BITS)
                n += 1
            assert n == int(found["kernel"][0][b, h])
    assert next(unused, None) is None


@pytest.mark.parametrize("few", [False, True])
def test_more_tiles_than_are_summed_up_at_once(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program that counts them, or by one that others counted for."""
    monkeypatch.setattr(prompt_write, "_AT_ONCE" if few else "_SCAN", 4)
    monkeypatch.setattr(prompt_write, "_FEW", 128 if few else 0)
    segments = make_segments([0, 0], [1000, 700], [0, 0])
    rng = torch.Generator().manual_seed(6)
    flags = torch.randint(4, (3, 1700), generator=rng).byte().to(DEVICE)
    counts = torch.arange(6, dtype=torch.int32, device=DEVICE).view(2, 3)
    got = prompt_write.count_leaving(flags, counts, segments, 10, 16)
    want = reference.count_leaving(flags, counts, segments, 10, 16)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    admitted = (flags[:, 1000:] & ADMITTED)[:, :640].view(3, 10, 64).sum(-1).cumsum(-1)
    assert torch.equal(got[2][1, :, 1:11] - counts[1, :, None], admitted)
