"""R-KV's scores straight from pages, against all cosines and logits in float64."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import redundancy_scores as kernels
from kvpolicy.ops import Heads, Ring
from tests.support.kernels.pool import DEVICE
from tests.support.kernels.scores import make_layer

SCALE, SEEN, KERNEL, MIX = 0.3, 6, 5, 0.4


def keys_of(layer, row, head):
    """A head's keys, the stored ones and then the window's, and the number of the first."""
    ids, count = layer.heads.table[row, head].long(), int(layer.heads.counts[row, head])
    length = int(layer.lengths[row])
    at = torch.arange(max(length - layer.window, 0), length, device=DEVICE)
    near = layer.ring_k[row, head, at % layer.ring_k.shape[2]]
    return torch.cat([layer.flat.k[ids].flatten(0, 1)[:count], near]), count


def cosines_of(keys):
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    unit = unit.to(keys.dtype).double()
    return (unit @ unit.T).fill_diagonal_(0)


def scores_of(layer, row, head, group, threshold, softcap):
    """Pair by pair and query by query, float64 `[n]`."""
    keys, count = keys_of(layer, row, head)
    cosines = cosines_of(keys)
    for i, own in enumerate(cosines.clone()):
        alike = (own > threshold).nonzero().flatten().tolist()
        cosines[i, alike[-1] if alike else 0] = 0
    redundancy = (cosines.sum(0) / len(cosines)).softmax(0)[:count]
    length, many = int(layer.lengths[row]), layer.ring_q.shape[1] // layer.heads.table.shape[1]
    mass, asked = torch.zeros(count, dtype=torch.float64, device=DEVICE), 0
    for at in range(max(length - SEEN, 0), length):
        q = layer.ring_q[row, head * many : (head + 1) * many, at % layer.ring_q.shape[2]].double()
        logits = q @ keys[:count].double().T * SCALE
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        mass += (logits.amax(0) if group == "max" else logits.mean(0)).softmax(0)
        asked += 1
    half = KERNEL // 2
    seen = [mass[max(n - half, 0) : n + half + 1].max() for n in range(count)]
    return torch.stack(seen) / asked * MIX - redundancy * (1 - MIX) if count else mass


def between(layer):
    """A threshold that no cosine is near."""
    rows = range(len(layer.lengths))
    every = torch.cat(
        [cosines_of(keys_of(layer, r, h)[0]).flatten() for r in rows for h in (0, 1, 2)]
    )
    every = every[(every > 0.3) & (every < 0.7)].sort().values
    at = int(every.diff().argmax())
    return float(every[at : at + 2].mean())


def asked(layer, part=(slice(None), slice(None)), **more):
    """Arguments after the pages, for some sequences and heads."""
    ring = Ring(layer.ring_k[part], layer.ring_k[part], layer.ring_k[part][..., 0].byte())
    many = layer.ring_q.shape[1] // layer.heads.table.shape[1]
    queries = layer.ring_q.unflatten(1, (-1, many))[part].flatten(1, 2)
    heads = Heads(*(x[part] for x in layer.heads))
    given = heads, ring, queries, layer.lengths[part[0]], layer.window, SCALE
    return given, {"observation": SEEN, "kernel": KERNEL, "mix": MIX, **more}


@pytest.mark.parametrize(("group", "softcap"), [("max", None), ("mean", 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores(dtype, group, softcap, monkeypatch):
    """Heads of a few tokens, of none, and a sequence shorter than the window and the queries."""
    monkeypatch.setattr(kernels, "_CHUNK", 16)
    monkeypatch.setattr(kernels, "_AT_ONCE", 200)  # two heads at a time
    layer = make_layer([60, 3, 17], 3, 2, 20, dtype, 12, SEEN)
    threshold = between(layer)
    given, options = asked(layer, threshold=threshold, group=group, softcap=softcap)
    for op, pages in (
        (kernels.redundancy_scores, layer.pool.pages),
        (reference.redundancy_scores, layer.flat),
    ):
        got = op(pages, *given, **options)
        width = layer.heads.table.shape[2] * layer.flat.k.shape[1]
        assert got.dtype == torch.float32 and got.shape == (3, 3, width)
        for row, head in [(r, h) for r in range(3) for h in range(3)]:
            wanted = scores_of(layer, row, head, group, threshold, softcap)
            error = (got[row, head, : len(wanted)] - wanted).abs()
            limit = 2e-6 if dtype == torch.float32 else 2e-4
            assert not len(wanted) or error.max() < limit, (op, row, head)
            assert not got[row, head, len(wanted) :].any()


def test_a_sequence_has_the_same_scores_alone():
    """Bit for bit, and whatever else its table has room for."""
    layer = make_layer([50, 90], 2, 1, 16, torch.bfloat16, 10, SEEN)
    given, options = asked(layer, threshold=0.5, group="max")
    both = kernels.redundancy_scores(layer.pool.pages, *given, **options)
    assert both.any()
    for head in range(2):
        (heads, *more), options = asked(
            layer, (slice(0, 1), slice(head, head + 1)), threshold=0.5, group="max"
        )
        heads = heads._replace(table=heads.table[..., :10])  # of 4 tokens: 40 have left the window
        alone = kernels.redundancy_scores(layer.pool.pages, heads, *more, **options)
        assert torch.equal(alone[0, 0], both[0, head, :40])
