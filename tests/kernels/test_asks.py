"""Softcap, sinks, chunks and values of another dim, by op and backend, against float64."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy.eviction import SnapKV
from kvpolicy.ops import ADMITTED, Heads, Ring, load
from tests.support.kernels import decode, prefill
from tests.support.kernels.plain import Asks, assert_asked_matters
from tests.support.kernels.pool import DEVICE, assert_within_budget, make_pool, randn
from tests.support.kernels.scores import make_layer, masses

F32, BF16 = torch.float32, torch.bfloat16
EVERYTHING = Asks(softcap=3.0, sink=4.0, chunk=16, dim_v=48, sharp=3.0)
DECODERS = {
    "gpt-oss": Asks(sink=3.0),
    "gemma2": Asks(softcap=2.0, sharp=4.0),
    "llama4": Asks(chunk=24),
    "mimo": Asks(sink=3.0, dim_v=32),
    "everything": EVERYTHING,
}
BACKENDS = ["reference", "triton"]
MODES = [("mean", "visible"), ("max", "visible"), ("max", "global")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_decode(name: str, backend: str) -> None:
    """Heads that end within their chunk's first page, an empty one, a row that is not active."""
    check = dict(group=3, dim=64, dtype=F32, window=5, slots=9, backend=backend)
    decode.check(
        [[40, 0], [3, 17], [9, 9]], lengths=[45, 31, 20], active=[True, True, False],
        asks=DECODERS[name], **check,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_of_one_sequence(backend: str) -> None:
    decode.check(
        [[40, 40]], lengths=[45], group=2, dim=32, dtype=BF16, asks=EVERYTHING, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readers", [2, 4])
def test_decode_of_selected_pages(readers: int, backend: str) -> None:
    chosen = [[0, 3, 4, -1], [-1, -1, -1, -1], [2, 4, -1, -1], [1, -1, -1, -1]]
    selected = torch.tensor([chosen[:readers]], dtype=torch.int32, device=DEVICE)
    decode.check(
        [[20, 13]], lengths=[25], group=2, dim=32, dtype=F32, page=4, selected=selected,
        asks=EVERYTHING, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_in_a_ring_as_long_as_a_chunk(backend: str) -> None:
    asks = Asks(chunk=8, sharp=2.0)
    for length in (7, 8, 20):
        decode.check(
            [[0], [0]], lengths=[length, 30], group=2, dim=32, dtype=F32, window=8, slots=12,
            asks=asks, backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_prompts(name: str, backend: str) -> None:
    """A later chunk, nothing, a whole prompt, one token; a head that admits nothing."""
    prefill.check(
        [37, 20, 0, 60], [30, 0, 21, 1], window=6, dim=64, rates=(0.7, 0.0),
        asks=DECODERS[name], backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "mimo", "everything"])
def test_dense_prompts(name: str, backend: str) -> None:
    asks = attrs.evolve(DECODERS[name], chunk=None)
    prefill.check(
        [37, 0, 60], [30, 21, 1], window=6, dim=64, rates=(1.0, 1.0), op="dense", asks=asks,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "chunk"), [(16, 16), (5, 32), (40, 12)])
def test_prompts_over_several_chunks(window: int, chunk: int, backend: str) -> None:
    asks = Asks(chunk=chunk, sink=2.0, sharp=2.0)
    prefill.check(
        [0, 30, 16], [70, 19, 16], window=window, dtype=BF16, rates=(0.6, 0.0), asks=asks,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("group", "normalize"), MODES)
def test_scores(group: str, normalize: str, backend: str) -> None:
    """Scores come from the attention's own weights; some queries lie before stored tokens."""
    asks, scale = Asks(softcap=2.0, sink=3.0, sharp=3.0), 0.3
    layer = make_layer([50, 3], 3, 2, 16, F32, 5, 8, factor=asks.sharp)
    policy = SnapKV(budget=99, observation=8, kernel=1, group=group, normalize=normalize)
    pages = layer.flat if backend == "reference" else None
    got = layer.call(load(backend).window_scores, policy, scale, pages, **asks.options(6))
    exact = masses(layer, policy, scale, asks, torch.float64)
    allowed = assert_within_budget(got, masses(layer, policy, scale, asks, F32), exact)
    assert_asked_matters(
        lambda kind, less: masses(layer, policy, scale, less, kind), asks, exact, allowed
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(12, 20), (20, 8)])
def test_values_of_another_dim_are_stored(dims: tuple[int, int], backend: str) -> None:
    """Tokens go in by every op that writes, are moved, and come out as they went in."""
    ops, page, window = load(backend), 4, 3
    pool = make_pool(16, page, dims[0], F32, slab_pages=16, dim_v=dims[1], width=2 * dims[0])
    pages, tokens = pool.pages, 14
    k, v = (randn(1, tokens, d, dtype=F32, seed=s) for s, d in enumerate(dims))
    table, counts = (torch.zeros(1, 1, *n, dtype=torch.int32, device=DEVICE) for n in ((9,), ()))
    heads = Heads(table, counts)

    def stored(number: torch.Tensor) -> None:
        """The tokens of these numbers lie in the pages, in order."""
        source = torch.arange(int(number.numel()), device=DEVICE).int()[None, None]
        for got, all in zip(ops.read_tokens(pages, table, source), (k, v), strict=False):
            assert torch.equal(got[0], all[:, number])
        ids = table[0, 0, : -(-source.shape[2] // page)]
        for got, all in zip(ops.read_pages(pages, ids), (k, v), strict=False):
            assert torch.equal(got.flatten(0, 1)[: source.shape[2]], all[0, number])

    # A prompt of 9 tokens in two calls, of which the second one's are appended.
    flags = torch.full((1, 8), ADMITTED, dtype=torch.uint8, device=DEVICE)
    seg = prefill.make_segments([0], [8], [8])
    after, fresh, ranks = ops.count_leaving(flags, counts, seg, window, page)
    ops.write_leaving(pages, heads, k[:, :8], v[:, :8], flags, seg, window, after, fresh, ranks)
    dest = torch.tensor([[5, 6]], device=DEVICE).int()
    ops.append(pages, table, k[:, 5:7], v[:, 5:7], dest, dest, torch.zeros_like(dest[0]))
    counts += 2
    ring = Ring(*(x[None, :, 7:10].roll(1, 2) for x in (k, v)), flags[None, :, :3].clone())
    for n in (10, 11, 12):
        lengths = torch.tensor([n], device=DEVICE)
        at = k[:, n], v[:, n], None, lengths, lengths > 0
        ops.decode_write(pages, heads, ring, *at, window, bits=ADMITTED, minmax=True)
    stored(torch.arange(10))
    keep = torch.arange(10, device=DEVICE) % 3 > 0
    ops.move_kept(
        pages, table[0], table[0], keep, torch.zeros(1, dtype=torch.int64, device=DEVICE), counts[0]
    )
    stored(keep.nonzero()[:, 0])
    target = torch.tensor([int(pages.free[0])], device=DEVICE).int()
    ops.copy_pages(pages, table[0, 0, :1], target)
    table[0, 0, :1] = target
    stored(keep.nonzero()[:, 0])
