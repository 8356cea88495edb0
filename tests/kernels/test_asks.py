"""Softcap, sinks, chunks and values of another dim, by op and backend, against float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import pytest
import torch

from kvpolicy.eviction import SnapKV
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.kernels._chunks import cut_at_chunks
from kvpolicy.ops import ADMITTED, Heads, Ring, check_asked, load
from tests.support.kernels import decode, prefill
from tests.support.kernels.plain import Asks, assert_asked_matters
from tests.support.kernels.pool import CUDA, DEVICE, assert_within_budget, make_pool, randn
from tests.support.kernels.scores import make_layer, masses

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = Asks(softcap=3.0, sink=4.0, chunk=16, dim_v=48, sharp=3.0)
DECODERS = {
    "gpt-oss": Asks(sink=3.0),
    "gemma2": Asks(softcap=2.0, sharp=4.0),
    "llama4": Asks(chunk=24),
    "mimo": Asks(sink=3.0, dim_v=32),
    "everything": EVERYTHING,
}
MODES = [("mean", "visible"), ("max", "visible"), ("max", "global")]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def on_both(cases: Iterable[Any], interpreted: Iterable[Any]) -> list[Any]:
    """Each case with each backend; the kernels' only some where they are interpreted."""
    few = list(interpreted)
    return [pytest.param(case, "reference", id=f"{case}-reference") for case in cases] + [
        pytest.param(case, "triton", marks=[] if case in few else GPU, id=f"{case}-triton")
        for case in cases
    ]


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that short prompts have many."""
    if not CUDA:
        small = sparse.Tile(16, 16, 4, 2, True)
        monkeypatch.setattr(sparse, "choose_tile", lambda *_: small)


@pytest.mark.parametrize(("name", "backend"), on_both(DECODERS, ["everything"]))
def test_decode(name: str, backend: str) -> None:
    """Heads that end within their chunk's first page, an empty one, a row that is not active."""
    decode.check(
        [[40, 0], [3, 17], [9, 9]], lengths=[45, 31, 20], active=[True, True, False], group=3,
        dim=64, dtype=F32, asks=DECODERS[name], backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_decode_of_one_sequence(backend: str) -> None:
    decode.check(
        [[40, 40]], lengths=[45], group=2, dim=32, dtype=BF16, asks=EVERYTHING, backend=backend
    )


@pytest.mark.parametrize(("readers", "backend"), on_both([2, 4], [4]))
def test_decode_of_selected_pages(readers: int, backend: str) -> None:
    chosen = [[0, 3, 4, -1], [-1, -1, -1, -1], [2, 4, -1, -1], [1, -1, -1, -1]]
    selected = torch.tensor([chosen[:readers]], dtype=torch.int32, device=DEVICE)
    decode.check(
        [[20, 13]], lengths=[25], group=2, dim=32, dtype=F32, page=4, selected=selected,
        asks=EVERYTHING, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize(("length", "backend"), on_both([7, 8, 20], [8]))
def test_decode_in_a_ring_as_long_as_a_chunk(length: int, backend: str) -> None:
    decode.check(
        [[0], [0]], lengths=[length, 30], group=2, dim=32, dtype=F32, window=8, slots=12,
        asks=Asks(chunk=8, sharp=2.0), backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "backend"), on_both(DECODERS, ["everything"]))
def test_prompts(name: str, backend: str, tile: None) -> None:
    """A later chunk, nothing, a whole prompt, one token; a head that admits nothing."""
    prefill.check(
        [37, 20, 0, 60], [30, 0, 21, 1], window=6, dim=64, rates=(0.7, 0.0),
        asks=DECODERS[name], backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_prompts_whose_rows_descriptors_load(backend: str, tile: None) -> None:
    asks = attrs.evolve(EVERYTHING, chunk=None, dim_v=16)
    prefill.check([60], [20], window=6, rates=(0.7, 0.0), asks=asks, backend=backend)


DENSE = ["gpt-oss", "gemma2", "mimo", "everything"]


@pytest.mark.parametrize(("name", "backend"), on_both(DENSE, ["everything"]))
def test_dense_prompts(name: str, backend: str, tile: None) -> None:
    asks = attrs.evolve(DECODERS[name], chunk=None)
    prefill.check(
        [37, 0, 60], [30, 21, 1], window=6, dim=64, rates=(1.0, 1.0), op="dense", asks=asks,
        backend=backend,
    )  # fmt: skip


CHUNKS = [(16, 16), (40, 12), (5, 32), (24, 32)]  # windows and chunks


@pytest.mark.parametrize(("sizes", "backend"), on_both(CHUNKS, CHUNKS[2:]))
def test_prompts_over_several_chunks(sizes: tuple[int, int], backend: str, tile: None) -> None:
    asks = Asks(chunk=sizes[1], sink=2.0, sharp=2.0)
    prefill.check(
        [0, 30], [70, 19], window=sizes[0], dtype=BF16, rates=(0.9, 0.0), asks=asks,
        backend=backend,
    )  # fmt: skip


def test_rows_of_chunks_are_as_many_as_a_kernel_is_compiled_for() -> None:
    segments = prefill.make_segments([0, 30, 5], [70, 3, 0], [70, 20, 4])
    found = cut_at_chunks(segments, 32)
    assert found.segments.start == (0, 32, 64, 30, 32, 5, 0, 0)
    assert found.segments.cu_q == (0, 32, 64, 70, 72, 73, 73, 73, 73)
    assert found.segments.cu_k == (0, 32, 64, 70, 89, 90, 94, 94, 94)
    assert found.owner is not None and found.owner.tolist() == [0, 0, 0, 1, 1, 2, 0, 0]
    assert cut_at_chunks(segments, 32) is found
    assert cut_at_chunks(segments, None).segments is segments


SIZES = [
    *[(d, d, BF16) for d in (32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512)],
    *[(64, 128, BF16), (192, 128, BF16), (512, 64, BF16)],
    *[(64, 64, F32), (192, 128, F32), (512, 512, F32), (96, 96, F16), (512, 512, F16)],
]


@pytest.mark.parametrize(
    ("size", "backend"), [*on_both(SIZES[2::8], []), *on_both(SIZES, [])[len(SIZES) :]]
)
@pytest.mark.parametrize("op", ["decode", "prompt", "dense"])
def test_any_head_dim(op: str, size: tuple[int, int, torch.dtype], backend: str) -> None:
    dim, dim_v, dtype = size
    asks = Asks(softcap=3.0, sink=7.0, dim_v=dim_v, sharp=3.0)
    given = dict(group=8, dim=dim, dtype=dtype, window=70, asks=asks, backend=backend)
    if op == "decode":
        given["asks"] = attrs.evolve(asks, chunk=400)
        decode.check([[700, 0], [33, 5]], lengths=[790, 120], slots=102, **given)
    elif op == "prompt":
        prefill.check([300, 0], [77, 110], rates=(0.9, 0.2), **given)
    else:
        prefill.check([300, 0], [77, 110], rates=(1.0, 1.0), op="dense", **given)


def test_what_cannot_be_asked_is_refused() -> None:
    for name, value in (("softcap", 0.0), ("sinks", torch.zeros(3)), ("chunk", 0)):
        with pytest.raises(ValueError, match=f"some_op: {name}: wanted .*, got "):
            check_asked("some_op", 4, **{"softcap": None, "sinks": None, name: value})
    pool = make_pool(2, 4, 16, F32, slab_pages=2)
    table, counts = (torch.zeros(1, 1, *n, dtype=torch.int32, device=DEVICE) for n in ((1,), ()))
    k, q = (torch.zeros(h, 2, 16, device=DEVICE) for h in (1, 4))
    rest = prefill.make_segments([0], [2], [2]), pool.pages
    for backend in ("reference", "triton"):
        op = load(backend).dense_prefill
        with pytest.raises(ValueError, match=r"dense_prefill: sinks: wanted \[4\].*got \[1\]"):
            op(q, k, k, *rest, table, 1.0, sinks=torch.zeros(1, device=DEVICE))


def test_too_many_channels_are_refused() -> None:
    given: dict[str, Any] = dict(group=1, dim=520, dtype=F32)
    message = "head_dim: wanted at most 512, got 520 "
    with pytest.raises(ValueError, match=f"paged_decode: {message}"):
        decode.check([[0]], lengths=[5], **given)
    for op, name in (("sparse", "prefill_attention"), ("dense", "dense_prefill")):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            prefill.check([0], [3], window=2, op=op, **given)


@pytest.mark.parametrize(("mode", "backend"), on_both(MODES, MODES[2:]))
def test_scores(mode: tuple[str, str], backend: str) -> None:
    """Scores come from the attention's own weights; some queries lie before stored tokens."""
    asks, scale = Asks(softcap=2.0, sink=3.0, sharp=3.0), 0.3
    layer = make_layer([50, 3], 3, 2, 16, F32, 5, 8, factor=asks.sharp)
    policy = SnapKV(budget=99, observation=8, kernel=1, group=mode[0], normalize=mode[1])
    pages = layer.flat if backend == "reference" else None
    got = layer.call(load(backend).window_scores, policy, scale, pages, **asks.options(6))
    exact = masses(layer, policy, scale, asks, torch.float64)
    allowed = assert_within_budget(got, masses(layer, policy, scale, asks, F32), exact)
    assert_asked_matters(
        lambda kind, less: masses(layer, policy, scale, less, kind), asks, exact, allowed
    )


@pytest.mark.parametrize(("dims", "backend"), on_both([(12, 20), (20, 8)], [(12, 20)]))
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
