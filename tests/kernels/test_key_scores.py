"""Dots, norms and sums of stored keys straight from pages, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import key_dots, lag_spreads, norms
from kvpolicy.ops import Heads, Pairs, Ring, whole_lags
from tests.support.kernels.pool import DEVICE, assert_within_budget
from tests.support.kernels.scores import make_layer

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(layer, kind):
    """Keys `[B, Hkv, N, D]` in a dtype, zeros where there is none."""
    keys = layer.flat.k[layer.heads.table.long()].flatten(2, 3).to(kind)
    valid = torch.arange(keys.shape[2], device=DEVICE) < layer.heads.counts[..., None]
    return keys.masked_fill(~valid[..., None], 0), valid


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)


def dots(layer, vectors, sizes, pairs, unit, kind):
    keys, valid = stored(layer, kind)
    group = vectors.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, 1)
    found = (keys * vectors.to(kind)[:, :, None]).sum(-1)
    for f in range(0 if sizes is None else sizes.shape[2]):
        at = pairs.first + f * pairs.step
        size = torch.hypot(keys[..., at], keys[..., at + pairs.gap])
        found = found + size * sizes.to(kind)[:, :, f, None]
    if unit:
        found = found / keys.norm(dim=-1).clamp(min=1e-8)
    return found.masked_fill(~valid.repeat_interleave(group, 1), 0)


@pytest.mark.parametrize(
    ("pairs", "unit"),
    [(None, False), (None, True), (Pairs(0, 1, 10), False), (Pairs(4, 2, 1), True)],
    ids=str,
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_dots(dtype, pairs, unit):
    layer = make_layer([90, 3], 3, 2, 20, dtype, 16, 4)
    vectors, sizes = normal(2, 6, 20), None
    if pairs:
        sizes = normal(2, 6, 10 if pairs.step == 1 else 8)
    exact, eager = (dots(layer, vectors, sizes, pairs, unit, x) for x in (torch.float64, dtype))
    got = key_dots.key_dots(layer.pool.pages, layer.heads, vectors, sizes, pairs, unit=unit)
    assert got.dtype == torch.float32
    assert_within_budget(got, eager, exact)
    assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    twin = reference.key_dots(layer.flat, layer.heads, vectors, sizes, pairs, unit=unit)
    assert_within_budget(twin, eager, exact)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_directions(dtype, monkeypatch):
    monkeypatch.setattr(key_dots, "_SPLIT", 32)
    layer = make_layer([90, 3], 3, 1, 20, dtype, 16, 4)

    keys, _ = stored(layer, torch.float64)
    exact = (keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)).sum(2)
    for op, pages in (
        (key_dots.key_directions, layer.pool.pages), (reference.key_directions, layer.flat),
    ):  # fmt: skip
        got = op(pages, layer.heads)
        assert got.dtype == torch.float64
        assert (got - exact).abs().max() <= 1e-6 * keys.shape[2] ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(dtype):
    layer = make_layer([90, 3], 3, 1, 20, dtype, 16, 4)
    flat = layer.pool.flat()
    flat = flat._replace(k=flat.k.nan_to_num(), v=flat.v.nan_to_num())
    ids = layer.heads.table.long()
    for name, store in (("key_norms", flat.k), ("value_norms", flat.v)):
        rows = store[ids].flatten(2, 3).double()
        valid = torch.arange(rows.shape[2], device=DEVICE) < layer.heads.counts[..., None]
        exact = rows.norm(dim=-1).masked_fill(~valid, 0)
        for module, pages in ((norms, layer.pool.pages), (reference, flat)):
            got = getattr(module, name)(pages, layer.heads)
            assert got.dtype == torch.float32
            assert torch.allclose(got.double(), exact, rtol=1e-5)


def ring_of(layer):
    return Ring(layer.ring_k, layer.ring_k, layer.ring_k[..., 0].byte())


def spreads(layer, sinks, lag, kind):
    """The formula, token by token."""
    keys, valid = stored(layer, kind)
    batch, kv_heads, width = valid.shape
    out = torch.zeros(batch, kv_heads, whole_lags(width + layer.window - sinks, lag), lag)
    out = out.to(DEVICE, kind)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(kv_heads)).tolist():
        length = int(layer.lengths[b])
        recent = torch.arange(max(length - layer.window, 0), length)
        near = layer.ring_k[b, h, recent % layer.ring_k.shape[2]].to(kind)
        x = torch.cat([keys[b, h, : int(layer.heads.counts[b, h])], near])[sinks:]
        for part in range(len(x) // lag - 1):
            own, after = x[part * lag :][:lag], x[(part + 1) * lag :][:lag]
            low, high = after.amin(0), after.amax(0)
            apart = torch.where(high == low, torch.ones_like(low), high - low)
            out[b, h, part] = ((own - low) / apart).std(-1)
    return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("window", "sinks", "lag"), [(16, 4, 8), (7, 0, 33), (40, 1, 5)], ids=str)
def test_spreads(window, sinks, lag, dtype):
    layer = make_layer([90, 3], 3, 1, 20, dtype, window, 4)
    for store in (layer.pool.extents, [(layer.flat.k,)]):
        for extent in store:
            extent[0][..., 3] = 0.5  # a channel that is one number
    layer.ring_k[..., 3].masked_fill_(layer.ring_k[..., 3].isfinite(), 0.5)
    exact, eager = (spreads(layer, sinks, lag, x) for x in (torch.float64, dtype))
    assert exact.any()
    rest = ring_of(layer), layer.lengths, window
    options = {"sinks": sinks, "lag": lag}
    got = lag_spreads.lag_spreads(layer.pool.pages, layer.heads, *rest, **options)
    assert_within_budget(got, eager, exact)
    assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    twin = reference.lag_spreads(layer.flat, layer.heads, *rest, **options)
    assert_within_budget(twin, eager, exact)


@pytest.mark.parametrize("name", ["dots", "directions", "norms", "spreads"])
def test_a_sequence_scores_the_same_alone(name):
    """Bit for bit: which tokens are evicted must not depend on the batch."""
    layer = make_layer([50, 90], 2, 2, 16, torch.bfloat16, 10, 12)
    vectors, pages = normal(2, 4, 16), layer.pool.pages

    def call(heads, part):
        ring = Ring(*(x[part] for x in ring_of(layer)))
        return {
            "dots": lambda: key_dots.key_dots(pages, heads, vectors[part], unit=True),
            "directions": lambda: key_dots.key_directions(pages, heads),
            "norms": lambda: norms.key_norms(pages, heads),
            "spreads": lambda: lag_spreads.lag_spreads(
                pages, heads, ring, layer.lengths[part], 10, sinks=2, lag=8
            ),
        }[name]()

    both = call(layer.heads, slice(0, 2))
    for row in range(2):
        part = slice(row, row + 1)
        table, counts = layer.heads
        used = -(-int(counts[row].max()) // 4)
        alone = call(Heads(table[part, :, :used], counts[part]), part)
        assert torch.equal(alone, both[part, :, : alone.shape[2]])


def test_nothing_stored():
    layer = make_layer([3, 4], 2, 1, 16, torch.float32, 4, 4)
    none = Heads(layer.heads.table[:, :, :0], layer.heads.counts)
    for module, pages in ((key_dots, layer.pool.pages), (reference, layer.flat)):
        assert module.key_dots(pages, layer.heads, normal(2, 2, 16)).eq(0).all()
        assert module.key_dots(pages, none, normal(2, 2, 16)).shape == (2, 2, 0)
        assert module.key_directions(pages, none).eq(0).all()
    for module, pages in ((norms, layer.pool.pages), (reference, layer.flat)):
        assert module.key_norms(pages, none).shape == module.value_norms(pages, none).shape
