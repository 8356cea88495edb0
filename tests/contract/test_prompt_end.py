"""The end of a prompt: decoding waits for it, and what it drops is freed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy import (
    Adaptive,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    LocalAttention,
    PhaseError,
    Pyramid,
    Ratio,
    RollbackError,
    SnapKV,
    Tokens,
)
from kvpolicy.store.rollback import crop
from tests.support.contract.cases import EVICTIONS, EXACT, NAMES, SMALL, build, caches, seeds
from tests.support.contract.driver import Run, stream, streams_of


@pytest.mark.parametrize("eviction", [name for name in EVICTIONS if name != "none"])
@settings(max_examples=3)
@given(sizes=caches(dtypes=EXACT, page_sizes=SMALL), seed=seeds)
def test_decoding_waits_for_the_prompt_end(eviction, sizes, seed):
    rows = [sizes.length]
    run = Run(build(sizes, eviction=eviction), sizes.spec, streams_of(sizes, rows, 1, seed))
    run.prompt(rows)
    with pytest.raises(PhaseError, match="end_prompt"):
        run.decode()
    run.end_prompt()
    run.decode()
    run.check()
    run.check_effect()


@settings(max_examples=20)
@given(caches(dtypes=EXACT, page_sizes=SMALL), st.tuples(*map(st.sampled_from, NAMES)), seeds)
def test_memory_is_freed(sizes, names, seed):
    """Pages in use are those that the stored tokens fill; reserved ones stay few."""
    pipeline = build(sizes, *names)
    rows = [sizes.length, sizes.length + 6]
    run = Run(pipeline, sizes.spec, streams_of(sizes, rows, 9, seed), oracle=False)
    run.prompt(rows)
    before = pipeline.report(run.state)
    run.end_prompt()
    after, pool = pipeline.report(run.state), run.state.devices.pools[0]
    size = sizes.spec.page_size
    filled = sum(int((-(-layer.counts // size)).sum()) for layer in run.state.layers)
    assert pool.used == filled
    assert pool.available <= max(filled // 10, 64)
    if not pipeline.eviction.neutral:
        assert after.pages < before.pages


@pytest.mark.parametrize(
    "budget", [Tokens(20), Ratio(20 / 45), Adaptive(Tokens(20)), Pyramid(Tokens(20), observation=9)]
)
def test_a_budget_counts_the_window(budget):
    """20 tokens a head, on average over heads and layers; 45 were seen."""
    spec = CacheSpec(layers=2, heads=2, kv_heads=2, head_dim=8, dtype=torch.float64)
    pipeline = CachePipeline(eviction=SnapKV(budget=budget, observation=4), window=7)
    run = Run(pipeline, spec, [stream(spec, 45, seed=3)], oracle=False)
    run.prompt([45])
    assert pipeline.report(run.state).stored == [[45, 45]] * 2
    run.end_prompt()
    assert sum(map(sum, pipeline.report(run.state).stored)) == 4 * 20


def test_a_window_that_lost_its_marks_cannot_be_cropped():
    """Nothing is in pages yet, but what the prompt's end decided stays decided."""
    local = AtPromptEnd(LocalAttention(window=8, sinks=1))
    pipeline = CachePipeline(window=8, eviction=local)
    state = pipeline.init(CacheSpec(layers=1, heads=1, kv_heads=1, head_dim=4))
    tokens = torch.zeros(1, 5, 4)
    pipeline.begin(state, [5], "prompt")
    pipeline.attend(state, 0, tokens, tokens, tokens)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    with pytest.raises(RollbackError):
        crop(state, [1])
