"""The reference on a CPU: what numpy does for a decoded token is what torch's operators do."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, Quest, RandomGate, SnapKV
from kvpolicy.reference import _even_host
from kvpolicy.store import CacheState

HEADS, DIM = 2, 8


def filled(pipeline: CachePipeline, steps: int, batch: int = 1, **spec: object) -> CacheState:
    """A cache of one layer after a prompt and decoded tokens."""
    generator = torch.Generator().manual_seed(3)
    sizes = dict(layers=1, heads=3 * HEADS, kv_heads=HEADS, head_dim=DIM, page_size=4)
    state = pipeline.init(CacheSpec(**sizes, **spec), batch)  # type: ignore[arg-type]

    def tokens(*shape: int) -> list[torch.Tensor]:
        heads = (3 * HEADS, HEADS, HEADS)
        made = [torch.randn(n, *shape, DIM, generator=generator) for n in heads]
        return [x.to(state.spec.dtype) for x in made]

    pipeline.begin(state, [21] * batch, "prompt")
    pipeline.attend(state, 0, *tokens(21 * batch))
    pipeline.commit(state)
    pipeline.end_prompt(state)
    for _ in range(steps):
        pipeline.begin(state, [1] * batch, "decode")
        pipeline.attend(state, 0, *(x.transpose(0, 1) for x in tokens(batch, 1)))
        pipeline.commit(state)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("parts", "batch"),
    [
        ({}, 1),
        ({"selection": Quest(budget=8)}, 1),
        ({"admission": RandomGate(sparsity=0.4), "selection": Quest(budget=8)}, 2),
        ({"eviction": SnapKV(budget=12, observation=3, when="decode")}, 1),
    ],
    ids=["full", "minmax", "ragged", "queries"],
)
def test_rows_that_numpy_writes(
    parts: dict[str, object], batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = CachePipeline(window=5, backend="reference", **parts)  # type: ignore[arg-type]
    by_numpy = filled(pipeline, 30, batch, dtype=dtype)
    monkeypatch.setattr("kvpolicy.reference.cache_write.on_host", lambda *_: False)
    by_torch = filled(pipeline, 30, batch, dtype=dtype)
    one, other = by_numpy.layers[0], by_torch.layers[0]
    for mine, theirs in zip((*one.rings, one.counts), (*other.rings, other.counts), strict=True):
        assert torch.equal(mine, theirs)
    assert int(one.counts.sum()) > 0
    for row in range(batch):
        for head in range(HEADS):
            assert torch.equal(by_numpy.kept(0, row, head), by_torch.kept(0, row, head))
    held = [x.table[x.table > 0].long() for x in (one, other)]
    pages = one.pool.pages, other.pool.pages
    for name in ("k", "v", "summary"):
        mine, theirs = (getattr(x, name) for x in pages)
        assert mine is None or torch.equal(mine[held[0]], theirs[held[1]])


@pytest.mark.parametrize("steps", [0, 2, 30])
@pytest.mark.parametrize("asked", [False, True], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("alone", [24, 1 << 18], ids=["pieces", "whole"])
def test_products_of_numpy(
    steps: int, asked: bool, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = filled(CachePipeline(window=5, backend="reference"), steps)
    layer, own = state.layers[0], state.on(state.layers[0])
    query = torch.randn(1, 3 * HEADS, DIM, generator=torch.Generator().manual_seed(4))
    given = query, layer.pool.pages, layer.heads, layer.ring, own.lengths - 1, own.active, 5, 0.3
    more = {"softcap": 2.0, "sinks": torch.linspace(-1, 1, 3 * HEADS)} if asked else {}
    monkeypatch.setattr(_even_host, "ALONE", alone)
    found = []
    for threads in (0, 1 << 30):  # from how few threads on torch's products are taken
        monkeypatch.setattr(_even_host, "THREADS", threads)
        found.append(state.ops.paged_decode(*given, **more))
    assert torch.allclose(*found, rtol=0, atol=1e-6) and float(found[0].abs().max()) > 0.01
