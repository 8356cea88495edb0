"""Expected logits and value norms straight from pages, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import expected_attention as kernels
from kvpolicy.ops import Heads
from tests.support.kernels.pool import DEVICE, assert_within_budget
from tests.support.kernels.scores import make_layer


def statistics(batch, heads, dim, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mean = torch.randn(batch, heads, dim, generator=rng)
    q = torch.randn(batch, heads, dim + 3, dim, generator=rng)
    square = q.mT @ q / dim**1.5
    square = (square + square.mT) / 2
    return mean.to(DEVICE), square.to(DEVICE)


def formula(layer, mean, square, kind):
    """m.k + k'Ck of what is stored, `[B, Hq, N]`, computed in a dtype."""
    ids = layer.heads.table.long()
    keys = layer.flat.k[ids].flatten(2, 3).to(kind)
    valid = torch.arange(keys.shape[2], device=DEVICE) < layer.heads.counts[..., None]
    group = mean.shape[1] // keys.shape[1]
    keys = keys.masked_fill(~valid[..., None], 0).repeat_interleave(group, 1)
    mean = mean.to(kind)
    found = (keys * mean[:, :, None]).sum(-1)
    if square is not None:
        found = found + ((keys @ square.to(kind)) * keys).sum(-1)
    return found


@pytest.mark.parametrize("with_square", [True, False], ids=["square", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "dim", "page"), [(1, 64, 4), (3, 80, 16), (2, 20, 4)])
def test_logits(group, dim, page, dtype, with_square):
    layer = make_layer([90, 3], 3, group, dim, dtype, 16, 4, page=page)
    mean, square = statistics(2, 3 * group, dim)
    square = square if with_square else None
    exact = formula(layer, mean, square, torch.float64)
    eager = formula(layer, mean, square, dtype)
    got = kernels.expected_logits(layer.pool.pages, layer.heads, mean, square)
    assert got.dtype == torch.float32
    assert_within_budget(got, eager, exact)
    # C keeps 16 bits where keys have fewer.
    assert (got.double() - exact).abs().max() <= 1e-4 * exact.abs().max()
    twin = reference.expected_logits(layer.flat, layer.heads, mean, square)
    assert_within_budget(twin, eager, exact)


@pytest.mark.parametrize("dim", [128, 256])
def test_large_heads(dim):
    layer = make_layer([80], 1, 4, dim, torch.bfloat16, 8, 4, page=16)
    mean, square = statistics(1, 4, dim)
    exact = formula(layer, mean, square, torch.float64)
    got = kernels.expected_logits(layer.pool.pages, layer.heads, mean, square)
    assert (got.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_queries_beyond_the_range_of_16_bits():
    layer = make_layer([40], 2, 1, 16, torch.float16, 4, 4)
    mean, square = statistics(1, 2, 16)
    exact = formula(layer, mean, square * 1e6, torch.float64)
    got = kernels.expected_logits(layer.pool.pages, layer.heads, mean, square * 1e6)
    assert torch.isfinite(got).all()
    assert (got.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_a_sequence_has_the_same_logits_alone():
    """Bit for bit: which tokens are evicted must not depend on the batch."""
    layer = make_layer([50, 90], 2, 2, 16, torch.bfloat16, 10, 12)
    mean, square = statistics(2, 4, 16)
    both = kernels.expected_logits(layer.pool.pages, layer.heads, mean, square)
    for row in range(2):
        part = slice(row, row + 1)
        table, counts = layer.heads
        used = -(-int(counts[row].max()) // 4)
        heads = Heads(table[part, :, :used], counts[part])
        alone = kernels.expected_logits(layer.pool.pages, heads, mean[part], square[part])
        assert torch.equal(alone, both[part, :, : used * 4])


def test_nothing_stored():
    layer = make_layer([3, 4], 2, 1, 16, torch.float32, 4, 4)
    mean, square = statistics(2, 2, 16)
    none = Heads(layer.heads.table[:, :, :0], layer.heads.counts)
    for module, pages in ((kernels, layer.pool.pages), (reference, layer.flat)):
        assert module.expected_logits(pages, layer.heads, mean, square).eq(0).all()
        assert module.expected_logits(pages, none, mean, square).shape == (2, 2, 0)
