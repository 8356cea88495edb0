"""What a cache remembers of tokens that were taken back: room to go back further, and evictions."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, RollbackError, SnapKV
from kvpolicy.store.rollback import crop
from tests.support.contract.driver import Run, stream

SPEC = CacheSpec(
    layers=2, heads=4, kv_heads=2, head_dim=8, page_size=2, rollback=5, interval=4,
    dtype=torch.float64,
)  # fmt: skip


def started(**parts):
    """A cache of 10 tokens, all of them of a prompt."""
    run = Run(CachePipeline(window=4, **parts), SPEC, [stream(SPEC, 40, 1)])
    run.prompt([10])
    run.end_prompt()
    return run


def test_an_aborted_call_takes_of_the_rollback():
    """Its tokens lay where those before the window of a shorter sequence were."""
    run = started()
    with pytest.raises(InterruptedError):
        run.decode([[True] * 3], fail_at=1)
    run.pipeline.abort(run.state)
    with pytest.raises(RollbackError, match="less 3 since the longest length"):
        crop(run.state, [3])
    crop(run.state, [2])
    assert run.state.lengths == [8]


def test_an_eviction_is_due_again_after_tokens_were_taken_back():
    run = started(eviction=SnapKV(budget=1000, observation=3, when="decode"))
    for _ in range(2):
        run.decode([[True] * 3])
        assert run.pipeline.due(run.state)
        run.maintain()
        run.pipeline.maintain(run.state)
        assert not run.pipeline.due(run.state)
        crop(run.state, [3])
        run.at = [10]
        for oracle in run.oracles[0]:
            oracle.crop(3)
