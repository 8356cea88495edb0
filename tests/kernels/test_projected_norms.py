"""Norms of stored values behind the output projection, against a plain loop in float64."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import projected_norms as kernels
from kvpolicy.ops import Heads
from tests.support.kernels.pool import DEVICE, randn
from tests.support.kernels.scores import make_layer


def formula(layer, weight):
    """Token by token, head by head."""
    group = weight.shape[0] // layer.heads.counts.shape[1]
    ids = layer.heads.table.long()
    found = torch.zeros(*ids.shape[:2], ids.shape[2] * layer.flat.v.shape[1], dtype=torch.float64)
    for b, row in enumerate(layer.heads.counts.tolist()):
        for h, count in enumerate(row):
            values = layer.flat.v[ids[b, h]].flatten(0, 1).double()
            for n in range(count):
                each = [
                    (values[n, :, None] * weight[h * group + g].double()).sum(0).abs().sum()
                    for g in range(group)
                ]
                found[b, h, n] = sum(each) / group
    return found.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "dim", "page", "hidden"), [(1, 64, 4, 40), (3, 20, 16, 130)])
def test_norms(group, dim, page, hidden, dtype):
    layer = make_layer([60, 3], 3, group, dim, dtype, 16, 4, page=page)
    columns = randn(hidden, 3 * group, dim, dtype=dtype, seed=9).permute(1, 2, 0)
    exact = formula(layer, columns)
    assert exact.max() > 0
    for weight in (columns, columns.contiguous()):
        for op, pages in ((kernels, layer.pool.pages), (reference, layer.flat)):
            got = op.projected_norms(pages, layer.heads, weight)
            assert got.dtype == torch.float32
            assert (got - exact).abs().max() <= 1e-5 * exact.max()


def test_a_sequence_has_the_same_norms_alone():
    """Bit for bit: which tokens are evicted must not depend on the batch."""
    layer = make_layer([50, 90], 2, 2, 16, torch.bfloat16, 10, 4)
    weight = randn(4, 16, 70, dtype=torch.bfloat16, seed=3)
    for op, pages in ((kernels, layer.pool.pages), (reference, layer.flat)):
        both = op.projected_norms(pages, layer.heads, weight)
        for row in range(2):
            table, counts = (x[row : row + 1] for x in layer.heads)
            used = -(-int(counts.max()) // 4)
            alone = op.projected_norms(pages, Heads(table[..., :used], counts), weight)
            assert torch.equal(alone, both[row : row + 1, :, : used * 4])


def test_nothing_stored_and_what_is_no_weight():
    layer = make_layer([3, 4], 2, 1, 16, torch.float32, 4, 4)
    weight = randn(2, 16, 8, dtype=torch.float32, seed=3)
    none = Heads(layer.heads.table[..., :0], layer.heads.counts)
    for op, pages in ((kernels, layer.pool.pages), (reference, layer.flat)):
        assert op.projected_norms(pages, layer.heads, weight).eq(0).all()
        assert op.projected_norms(pages, none, weight).shape == (2, 2, 0)
    with pytest.raises(TypeError, match="projected_norms: weight is torch.float64"):
        kernels.projected_norms(layer.pool.pages, layer.heads, weight.double())
