"""What only a device shows: pools beyond 2^31 elements, no host syncs, capture."""

from __future__ import annotations

import warnings

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import cache_write, page_io, page_select, paged_decode, write_gate
from kvpolicy.ops import Heads, Pages, Ring
from tests.support.kernels.pool import DEVICE, assert_within_budget, fill_heads, make_pool, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device"),
]


def test_pool_beyond_int32() -> None:
    page, dim = 16, 128
    count = (1 << 31) // (page * dim) + 64
    if torch.cuda.mem_get_info()[0] < 6 * count * page * dim:
        pytest.skip("needs 12 GB of free device memory")
    store = [torch.empty(count, page, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    small = [torch.zeros(count, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    meta = torch.zeros(count, page, dtype=torch.int32, device=DEVICE)
    slabs = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    pages = Pages(*store, meta, None, slabs, 1 << 21, small[0], small[0][:1], small[1])
    ids = torch.arange(count - 12, count, dtype=torch.int32, device=DEVICE).view(1, 2, 6)
    key, value = (randn(2, 90, dim, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    dest = torch.arange(90, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    cache_write.append(pages, ids, key, value, dest, dest, torch.zeros_like(dest[0]))
    k, v, at = page_io.read_pages(pages, ids[0])
    assert torch.equal(k.flatten(1, 2)[:, :90], key)
    assert torch.equal(v.flatten(1, 2)[:, :90], value)
    assert torch.equal(at.flatten(1)[:, :90], dest)
    query = randn(1, 8, dim, dtype=torch.bfloat16, seed=3)
    ring = randn(1, 2, 4, dim, dtype=torch.bfloat16, seed=4)
    counts = torch.full((1, 2), 90, dtype=torch.int32, device=DEVICE)
    lengths, active = torch.tensor([100], device=DEVICE), torch.ones(1, device=DEVICE).bool()
    heads = Heads(ids, counts)
    recent = Ring(ring, ring, torch.zeros(1, 2, 4, dtype=torch.uint8, device=DEVICE))
    got = paged_decode.paged_decode(query, pages, heads, recent, lengths, active, 4, 0.1)
    keys, values = (torch.cat([x, ring[0]], 1).repeat_interleave(4, 0) for x in (key, value))
    results = []
    for kind in (torch.bfloat16, torch.float64):
        scores = (query[0, :, None].to(kind) @ keys.to(kind).transpose(1, 2)) * 0.1
        results.append((scores.softmax(-1) @ values.to(kind)).transpose(0, 1))
    assert_within_budget(got, *results)


def test_a_step_captures_without_syncs_and_replays_bit_for_bit() -> None:
    dim, page, heads, window, slots, dtype = 128, 16, 4, 8, 12, torch.bfloat16
    pool = make_pool(64, page, dim, dtype, slab_pages=16, width=2 * dim)
    table, counts = fill_heads(pool, [[40, 0, 65, 16], [1, 31, 7, 90]], seed=1)
    table = torch.cat([table, torch.zeros_like(table)], -1)
    pages, lengths = pool.pages, torch.tensor([120, 200], device=DEVICE)
    active = torch.ones(2, dtype=torch.bool, device=DEVICE)
    ring_k, ring_v = (randn(2, heads, slots, dim, dtype=dtype, seed=s) for s in (2, 3))
    flags = torch.ones(2, heads, slots, dtype=torch.uint8, device=DEVICE)
    stored, ring = Heads(table, counts), Ring(ring_k, ring_v, flags)
    key, value = (randn(2, heads, dim, dtype=dtype, seed=s) for s in (4, 5))
    query = randn(2, 4 * heads, dim, dtype=dtype, seed=6)
    ones = torch.ones(2, heads, dtype=torch.uint8, device=DEVICE)
    gate = [torch.ones(dim, device=DEVICE, dtype=dtype)] * 2 + [
        randn(*shape, dtype=dtype, seed=7)
        for shape in ((heads, 512, 2 * dim), (heads, 512), (heads, 512), (heads,))
    ]
    state = [table, counts, ring_k, ring_v, flags, lengths, pages.top, pages.refs]
    state += [tensor for extent in pool.extents for tensor in extent]
    before = [tensor.clone() for tensor in state]

    def step() -> tuple[torch.Tensor, ...]:
        across = key.transpose(0, 1)
        scores = write_gate.write_gate(across, across, *gate)
        cache_write.decode_write(
            pages, stored, ring, key, value, ones, lengths, active, window, minmax=True
        )
        chosen = page_select.quest_select(pages, stored, query, 3, "mean", 1, 1)
        rest = (stored, ring, lengths, active, window, 0.1)
        full = paged_decode.paged_decode(query, pages, *rest)
        some = paged_decode.paged_decode(query, pages, *rest, chosen)
        lengths.add_(1)
        return scores, chosen, full, some

    def rewind() -> None:
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)

    step()  # compiles
    rewind()
    try:
        with warnings.catch_warnings():  # torch says that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        eager = [[x.clone() for x in step()] for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    rewind()
    for wanted in eager:
        graph.replay()
        for got, want in zip(out, wanted, strict=True):
            assert torch.equal(got, want)
    assert int(counts.sum()) == int(before[1].sum()) + 20 * 2 * heads
    pages = pool.flat()
    want = reference.paged_decode(
        query, pages._replace(k=pages.k.nan_to_num(), v=pages.v.nan_to_num()), stored, ring,
        lengths - 1, active, window, 0.1,
    )  # fmt: skip
    torch.testing.assert_close(out[2], want, atol=2e-2, rtol=2e-2)
