"""How much a head's keys repeat each other, against all cosines at once in float64."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import mean_cosines as kernels
from kvpolicy.ops import Heads, Ring
from tests.support.kernels.pool import DEVICE
from tests.support.kernels.scores import make_layer


def units_of(layer, row, head):
    """The keys of a head over their norms `[n, D]` float64: stored ones, then the window's."""
    ids, count = layer.heads.table[row, head].long(), int(layer.heads.counts[row, head])
    length = int(layer.lengths[row])
    at = torch.arange(max(length - layer.window, 0), length, device=DEVICE)
    near = layer.ring_k[row, head, at % layer.ring_k.shape[2]]
    keys = torch.cat([layer.flat.k[ids].flatten(0, 1)[:count], near]).double()
    return (keys / keys.norm(dim=-1, keepdim=True)).to(near.dtype).double()


def formula(layer, threshold):
    """Means by row and head, from pairs one by one."""
    found = {}
    for row, head in [(r, h) for r in range(len(layer.lengths)) for h in range(3)]:
        cosines = units_of(layer, row, head)
        cosines = (cosines @ cosines.T).fill_diagonal_(0)
        for i, own in enumerate(cosines.clone()):
            alike = (own > threshold).nonzero().flatten().tolist()
            cosines[i, alike[-1] if alike else 0] = 0
        found[row, head] = cosines.sum(0) / len(cosines)
    return found


def between(layer):
    """A threshold that no cosine is near."""
    cosines = [units_of(layer, row, h) for row in range(len(layer.lengths)) for h in range(3)]
    every = torch.cat([(x @ x.T).flatten() for x in cosines])
    every = every[(every > 0.3) & (every < 0.7)].sort().values
    at = int(every.diff().argmax())
    return float(every[at : at + 2].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_means(dtype):
    layer = make_layer([60, 3, 17], 3, 1, 20, dtype, 12, 4)
    ring, threshold = Ring(layer.ring_k, layer.ring_k, layer.ring_k[..., 0].byte()), between(layer)
    given = layer.heads, ring, layer.lengths, layer.window, threshold
    wanted = formula(layer, threshold)
    for op, pages in (
        (kernels.mean_cosines, layer.pool.pages),
        (reference.mean_cosines, layer.flat),
    ):
        got = op(pages, *given)
        width = layer.heads.table.shape[2] * layer.flat.k.shape[1] + layer.window
        assert got.dtype == torch.float32 and got.shape == (3, 3, width)
        for (row, head), means in wanted.items():
            error = (got[row, head, : len(means)] - means).abs().max()
            assert error < (1e-6 if dtype == torch.float32 else 2e-4), (op, row, head)
            assert not got[row, head, len(means) :].any()


def test_a_sequence_has_the_same_means_alone():
    """Bit for bit, and whatever else its table has room for."""
    layer = make_layer([50, 90], 2, 1, 16, torch.bfloat16, 10, 4)
    ring = Ring(layer.ring_k, layer.ring_k, layer.ring_k[..., 0].byte())
    both = kernels.mean_cosines(
        layer.pool.pages, layer.heads, ring, layer.lengths, layer.window, 0.5
    )
    assert both.any()
    for head in range(2):
        part = slice(0, 1), slice(head, head + 1)
        table = layer.heads.table[part][..., :10]  # of 4 tokens: 40 have left the window
        alone = kernels.mean_cosines(
            layer.pool.pages, Heads(table, layer.heads.counts[part]),
            Ring(*(x[part] for x in ring)), layer.lengths[:1], layer.window, 0.5,
        )  # fmt: skip
        assert torch.equal(alone[0, 0, :50], both[0, head, :50])
