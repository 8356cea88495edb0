"""The cap on bytes: never exceeded; room is made by eviction where that is asked for."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CapacityError, RandomGate
from kvpolicy.store.fork import select_rows
from tests.support.contract.capped import KV_HEADS, SPEC, WINDOW, Feed, Taste
from tests.support.contract.contents import digest
from tests.support.contract.driver import Run, stream


def page_bytes(pipeline, spec):
    return pipeline.init(spec).devices.pools[0].page_bytes


@pytest.mark.parametrize(
    ("backend", "pages", "chunks", "steps"), [("reference", 192, 9, 70), ("triton", 64, 2, 2)]
)
def test_the_byte_cap_makes_room(backend, pages, chunks, steps):
    pipeline = CachePipeline(window=WINDOW, eviction=Taste(), backend=backend)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    spec = attrs.evolve(SPEC, dtype=torch.float32, device=torch.device(device))
    most = pages * page_bytes(pipeline, spec)
    spec = attrs.evolve(spec, max_bytes=most, at_cap="evict")
    run = Feed(pipeline, spec, batch=2)
    for _ in range(chunks):
        run.call([30, 25], "prompt")
        assert run.held() <= spec.max_bytes
    run.pipeline.end_prompt(run.state)
    for _ in range(steps):
        run.call([1, 1], "decode")
        assert run.held() <= spec.max_bytes
    report = run.pipeline.report(run.state)
    assert report.cap_evicted > 0
    for layer in run.state.layers:
        for row, length in enumerate(run.state.lengths):
            # Nothing is lost: what is not stored was evicted.
            assert (layer.counts + layer.evicted)[row].tolist() == [length - WINDOW] * KV_HEADS
            assert int(layer.counts[row].min()) > 0


def test_a_prompt_call_beyond_the_byte_cap_raises_and_chunks_of_it_fit():
    pipeline = CachePipeline(window=WINDOW, eviction=Taste())
    spec = attrs.evolve(SPEC, max_bytes=128 * page_bytes(pipeline, SPEC), at_cap="evict")
    run = Feed(pipeline, spec)
    run.call([20], "prompt")
    before = digest(run.state)
    with pytest.raises(CapacityError):
        run.call([200], "prompt")
    pipeline.abort(run.state)
    assert digest(run.state) == before
    for _ in range(10):
        run.call([20], "prompt")
    assert run.state.lengths == [220]


def test_room_is_made_beside_a_fork_which_keeps_its_tokens():
    pipeline = CachePipeline(window=WINDOW, eviction=Taste())
    spec = attrs.evolve(SPEC, max_bytes=128 * page_bytes(pipeline, SPEC), at_cap="evict")
    run = Feed(pipeline, spec)
    run.call([100], "prompt")
    run.pipeline.end_prompt(run.state)
    fork = select_rows(run.state, [0])
    before = digest(fork)
    for _ in range(80):
        run.call([1], "decode")
        assert run.held() <= spec.max_bytes
    assert run.pipeline.report(run.state).cap_evicted > 0
    assert digest(fork) == before


def test_nothing_is_evicted_in_vain():
    pipeline = CachePipeline(window=WINDOW, eviction=Taste())
    spec = attrs.evolve(SPEC, max_bytes=128 * page_bytes(pipeline, SPEC), at_cap="evict")
    run = Feed(pipeline, spec)
    run.call([126], "prompt")  # 4 heads of 30 pages, all of them shared below
    run.pipeline.end_prompt(run.state)
    fork = Feed(pipeline, spec)
    fork.state = select_rows(run.state, [0])
    fork.call([1], "decode")
    before = digest(run.state)
    with pytest.raises(CapacityError):
        run.call([1], "decode")
    assert digest(run.state) == before


def test_a_prompt_call_that_admits_little_needs_no_room_for_all_of_it():
    parts = {"admission": RandomGate(sparsity=0.9), "eviction": Taste()}
    pipeline = CachePipeline(window=WINDOW, **parts)
    spec = attrs.evolve(SPEC, max_bytes=128 * page_bytes(pipeline, SPEC), at_cap="evict")
    run = Feed(pipeline, spec)
    run.call([600], "prompt")
    assert pipeline.report(run.state).cap_evicted == 0
    run.call([600], "prompt")
    assert run.state.lengths == [1200]


def test_a_byte_cap_holds_at_every_step():
    """Pages in use and reserved stay below `max_bytes`; calls that cannot, change nothing."""
    page = 2 * (2 * 8 * 8 + 4)
    spec = attrs.evolve(SPEC, page_size=2, max_bytes=150 * page)
    pipeline = CachePipeline(window=4)
    run = Run(pipeline, spec, [stream(spec, 200, 1)])

    def held():
        report = pipeline.report(run.state)
        return report.pages + report.reserved + report.positions + report.summaries

    run.prompt([30])
    with pytest.raises(CapacityError, match="at most 149.*raise the cap"):
        for _ in range(170):
            run.decode()
            assert held() <= spec.max_bytes
    assert run.at[0] > 4 + 149 // 4 * 2 - spec.interval
    run.check()
    with pytest.raises(CapacityError):
        run.prompt([60])
    pipeline.abort(run.state)
    run.check()
    assert held() <= spec.max_bytes


def test_a_cap_below_the_first_pages():
    with pytest.raises(ValueError, match="max_bytes: wanted at least .* got 1000"):
        CachePipeline(window=4).init(attrs.evolve(SPEC, max_bytes=1000))
