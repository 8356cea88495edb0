"""Scores straight from pages are what SnapKV says of the dense view, in float64."""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch

from kvpolicy import reference
from kvpolicy.eviction import SnapKV
from kvpolicy.eviction._attention import attention
from kvpolicy.kernels import _levels
from kvpolicy.kernels import window_scores as kernels
from kvpolicy.ops import Heads, Ring
from tests.support.kernels.pool import CUDA, DEVICE, assert_within_budget
from tests.support.kernels.scores import clean, make_layer

MODES = [
    {"group": g, "normalize": n, "pooling": p}
    for g, n, p in [
        ("mean", "visible", "avg"),
        ("max", "visible", "max"),
        ("mean", "global", "avg"),
        ("max", "global", "avg"),
    ]
]


def compare(layer, policy, scale=0.3):
    """Kernel and reference against `score` in float64, within the error of `score` as it is."""
    exact = policy.score(clean(layer.view(torch.float64, scale, policy.observation)))
    eager = policy.score(clean(layer.view(layer.ring_q.dtype, scale, policy.observation)))
    got = layer.call(kernels.window_scores, policy, scale)
    assert got.dtype == torch.float32
    assert_within_budget(got, eager, exact)
    twin = layer.call(reference.window_scores, policy, scale, layer.flat)
    assert twin.dtype == torch.float32
    assert_within_budget(twin, eager, exact)
    return got


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize(("window", "observation"), [(16, 16), (5, 24), (40, 7)])
def test_scores(window, observation, mode):
    layer = make_layer([90, 3, window + 9], 3, 2, 16, torch.float32, window, observation)
    compare(layer, SnapKV(budget=99, observation=observation, **mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "dim", "first"), [(1, 64, "high"), (3, 80, "low")])
def test_sizes_and_types(group, dim, first, dtype):
    layer = make_layer([100], 2, group, dim, dtype, 20, 33, first=first, seed=3)
    for mode in MODES[:2]:
        compare(layer, SnapKV(budget=99, observation=33, kernel=7, **mode))


@pytest.mark.parametrize("dim", [128, 256])
def test_large_heads(dim):
    layer = make_layer([80], 1, 4, dim, torch.bfloat16, 8, 8, page=16)
    compare(layer, SnapKV(budget=99, observation=8, group="max"), dim**-0.5)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_several_splits_and_tiles(mode, monkeypatch):
    monkeypatch.setattr(kernels, "_SPLIT", 32)
    monkeypatch.setattr(_levels, "_PARTS", 2)
    monkeypatch.setattr(kernels, "choose_tile", lambda *a: kernels.Tile(16, 16, 4, 2))
    layer = make_layer([85], 2, 2, 16, torch.float32, 10, 20, page=16, seed=5)
    compare(layer, SnapKV(budget=99, observation=20, **mode))


def weights_of(layer, observation, kind, row=0, sinks=None):
    """Weights `[Hkv, G, w, N + W]` of a sequence's queries."""
    view = clean(layer.view(kind, 0.3, observation))._replace(sinks=sinks)
    return attention(view, row, view.valid.shape[2])


@pytest.mark.parametrize(("window", "observation"), [(16, 16), (5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_largest_weights(window, observation, dtype):
    layer = make_layer([90], 3, 2, 16, dtype, window, observation)
    width = layer.heads.table.shape[2] * 4
    exact, eager = (
        weights_of(layer, observation, x).amax(1).mean(1)[None, :, :width]
        for x in (torch.float64, dtype)
    )
    for op, pages in ((kernels, layer.pool.pages), (reference, layer.flat)):
        ring = Ring(layer.ring_k, layer.ring_k, layer.ring_k[..., 0].byte())
        got = op.window_scores(
            pages, layer.heads, ring, layer.ring_q, layer.lengths, window, 0.3,
            observation=observation, kernel=1, pooling="avg", group="each", normalize="visible",
        )  # fmt: skip
        within(got, eager, exact, dtype)


def within(got, eager, exact, dtype):
    if dtype == torch.float32:  # a square's error is twice a weight's
        assert (got - exact).abs().max() <= 1e-6 * exact.max()
    else:
        assert_within_budget(got, eager, exact)


@pytest.mark.parametrize(("window", "observation"), [(16, 16), (5, 24), (33, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("squared", [False, True])
def test_masses_of_stored_tokens_and_of_the_window(window, observation, dtype, squared):
    """One sequence is shorter than the window, and some of its queries are not there."""
    layer = make_layer([90, 3], 3, 2, 16, dtype, window, observation)
    sinks = torch.randn(6, device=DEVICE)
    ring = Ring(layer.ring_k, layer.ring_k, layer.ring_k[..., 0].byte())
    width = layer.heads.table.shape[2] * 4
    for row in range(2):
        exact, eager = (
            weights_of(layer, observation, kind, row, sinks) for kind in (torch.float64, dtype)
        )
        if squared:
            exact, eager = exact.square(), eager.square()
        exact, eager = exact.sum((1, 2)), eager.sum((1, 2))
        for op, pages in ((kernels, layer.pool.pages), (reference, layer.flat)):
            far, near = op.window_masses(
                pages, layer.heads, ring, layer.ring_q, layer.lengths, window, 0.3,
                observation=observation, squared=squared, sinks=sinks,
            )  # fmt: skip
            assert far.shape == (2, 3, width) and near.shape == (2, 3, window)
            within(torch.cat([far, near], -1)[row], eager, exact, dtype)


def test_a_chunk_of_the_reference_is_small(monkeypatch):
    module = __import__("kvpolicy.reference.window_scores", fromlist=["_LOGITS"])
    layer = make_layer([150, 70], 2, 2, 16, torch.float32, 9, 12)
    policy = SnapKV(budget=99, observation=12)
    whole = layer.call(reference.window_scores, policy, 0.3, layer.flat)
    monkeypatch.setattr(module, "_LOGITS", 20 * 2 * 4 * 12)
    parts = layer.call(reference.window_scores, policy, 0.3, layer.flat)
    assert torch.allclose(whole, parts, atol=1e-7)


def test_large_logits_overflow_nothing():
    layer = make_layer([60], 2, 2, 16, torch.bfloat16, 4, 4, factor=300.0)
    policy = SnapKV(budget=99, observation=4, kernel=1)
    view = clean(layer.view(torch.float64, 0.3, 4))
    exact = policy.score(view)
    got = layer.call(kernels.window_scores, policy, 0.3)
    assert torch.isfinite(got).all()
    # A logit in single precision is off by some units of its size, a weight by that factor.
    most = 0.3 * view.queries.norm(dim=-1).max() * view.keys.norm(dim=-1).max()
    assert most > 1000
    off = 8 * torch.finfo(torch.float32).eps * most
    assert (got <= exact * off.exp() + 1e-30).all() and (got >= exact * (-off).exp() - 1e-30).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_nan_weighs_nothing(mode):
    layer = make_layer([60, 60], 2, 2, 16, torch.float32, 4, 4)
    layer.ring_q[0, 0, int(layer.lengths[0] - 2) % layer.ring_q.shape[2], 3] = float("nan")
    policy = SnapKV(budget=99, observation=4, **mode)
    view = layer.view(torch.float64, 0.3, 4)
    assert view.queries.isnan().any()
    exact = policy.score(view)
    got = layer.call(kernels.window_scores, policy, 0.3)
    twin = layer.call(reference.window_scores, policy, 0.3, layer.flat)
    assert torch.allclose(got.double(), exact, atol=1e-6)
    assert torch.allclose(twin.double(), exact, atol=1e-6)


def test_nothing_stored():
    layer = make_layer([3, 4], 2, 1, 16, torch.float32, 4, 4)
    policy = SnapKV(budget=99, observation=4)
    assert layer.call(kernels.window_scores, policy, 0.3).eq(0).all()
    layer.heads = Heads(layer.heads.table[:, :, :0], layer.heads.counts)
    for op, pages in ((kernels.window_scores, None), (reference.window_scores, layer.flat)):
        assert layer.call(op, policy, 0.3, pages).shape == (2, 2, 0)


@pytest.mark.parametrize("of", [kernels, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_a_sequence_scores_the_same_alone(mode, of, monkeypatch):
    """Bit for bit: which tokens are evicted must not depend on the batch."""
    monkeypatch.setattr(kernels, "_SPLIT", 32)
    layer = make_layer([50, 90], 2, 2, 16, torch.float32, 10, 12)
    pages = layer.flat if of is reference else None
    policy = SnapKV(budget=99, observation=12, **mode)
    both = layer.call(of.window_scores, policy, 0.3, pages)
    for row in range(2):
        part = slice(row, row + 1)
        table, counts = layer.heads
        used = -(-int(counts[row].max()) // 4)
        alone = attrs.evolve(
            layer, heads=Heads(table[part, :, :used], counts[part]),
            ring_k=layer.ring_k[part], ring_q=layer.ring_q[part], lengths=layer.lengths[part],
        ).call(of.window_scores, policy, 0.3, pages)  # fmt: skip
        valid = torch.arange(used * 4, device=DEVICE) < counts[part, :, None]
        assert torch.equal(alone[valid], both[part, :, : used * 4][valid])


def test_float64_is_refused():
    layer = make_layer([30], 1, 1, 16, torch.float32, 4, 4)
    layer.ring_q = layer.ring_q.double()
    with pytest.raises(TypeError, match="window_scores: queries is torch.float64"):
        layer.call(kernels.window_scores, SnapKV(budget=9, observation=4), 0.3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dim", "group", "observation"), list(itertools.product([64, 128, 256], [1, 4], [32, 256]))
)
def test_on_a_device(dim, group, observation):
    layer = make_layer([9000, 5003], 3, group, dim, torch.bfloat16, 256, observation, page=16)
    for mode in MODES:
        compare(layer, SnapKV(budget=999, observation=observation, **mode), dim**-0.5)
