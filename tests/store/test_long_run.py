"""Very long decoding: pages come back, memory stays flat, counters hold."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, CapacityError, RandomGate, SnapKV
from kvpolicy.ops import POSITION_MASK

SPEC = CacheSpec(layers=1, heads=1, kv_heads=1, head_dim=2, page_size=4, rollback=2, interval=64)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.5),
    eviction=SnapKV(budget=20, observation=2, kernel=1, when="decode"),
    window=3,
)


def decode(rows, steps):
    """Decodes `steps` tokens for each of `rows` sequences; reports every eighth of the way."""
    state = PIPELINE.init(SPEC, rows)
    rng, reports = torch.Generator().manual_seed(0), []
    for step in range(1, steps + 1):
        PIPELINE.begin(state, [1] * rows, "decode")
        q, k, v = torch.randn(3, rows, 1, 1, 2, generator=rng)
        PIPELINE.attend(state, 0, q, k, v)
        PIPELINE.commit(state)
        if step % (steps // 8) == 0:
            reports.append(PIPELINE.report(state))
    return state, reports


@pytest.mark.parametrize(
    ("rows", "steps"), [(10, 2048), pytest.param(50, 20480, marks=pytest.mark.slow)]
)
def test_memory_is_flat(rows, steps):
    state, reports = decode(rows, steps)
    pool, layer = state.devices.pools[0], state.layers[0]
    assert state.lengths == [steps] * rows
    # Every token is in the window, on a page, evicted, or was never admitted.
    admitted = layer.counts + layer.evicted
    assert (admitted < steps).all() and (admitted > 0.4 * steps).all()
    assert (layer.counts <= 17 + SPEC.interval).all()
    most = -(-(17 + SPEC.interval) // 4) * rows
    assert pool.used == int((-(-layer.counts // 4)).sum()) <= most
    kept = [report.total - report.tables for report in reports]
    assert max(kept) <= 1.3 * min(kept)
    tables = reports[-1].tables - reports[-2].tables
    assert tables <= rows * (steps // 8 // 4 + 1024) * 4  # page tables are as wide as sequences
    before = pool.capacity
    state.reset()
    assert pool.used == 0 and pool.capacity <= before


def test_positions_end_before_they_overflow():
    """A position has 30 bits; what would need more raises."""
    state = PIPELINE.init(SPEC, 1)
    state.sequences[0].length = POSITION_MASK
    state.widen = lambda tokens: None  # its table would take a gigabyte
    PIPELINE.begin(state, [1], "decode")
    PIPELINE.abort(state)
    for phase, counts in (("decode", [1]), ("prompt", [2])):
        state.sequences[0].length = POSITION_MASK + (phase == "decode")
        with pytest.raises(CapacityError, match="at most 1073741824 tokens"):
            PIPELINE.begin(state, counts, phase)
        assert state.call is None
