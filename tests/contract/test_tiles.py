"""Tiles choose by position: equal blocks, bit by bit, however calls between tiles cut a prompt."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CacheSpec, PerPhase, Quest, Selection, XAttention
from kvpolicy.pipeline import CachePipeline
from kvpolicy.store.fork import select_rows
from tests.support.contract.cases import ADMISSIONS, EVICTIONS, Sizes
from tests.support.contract.driver import Run, streams_of

TILE = 8
CUTS = ([8, 16, 40, 100], [24, 0, 8, 8, 100], [64, 100])


@pytest.fixture
def chosen(monkeypatch):
    """What every call of `choose` gave, by layer."""
    seen, choose = {}, XAttention.choose

    def record(self, ops, call):
        reads = choose(self, ops, call)
        seen.setdefault(call.layer, []).append((call.segments, reads))
        return reads

    monkeypatch.setattr(XAttention, "choose", record)
    return seen


def blocks_of(seen, row, rows):
    """Blocks of a sequence's tiles over all calls `[layer] -> [Hq, N, M]`."""
    found = []
    for layer in sorted(seen):
        parts = []
        for segments, reads in seen[layer]:
            spans = [
                (start // TILE, (start + b - a - 1) // TILE + 1) if b > a else (0, 0)
                for start, a, b in zip(
                    segments.start, segments.cu_q, segments.cu_q[1:], strict=False
                )
            ]
            first = sum(b - a for a, b in spans[:row])
            own = reads.blocks[:, first : first + spans[row][1] - spans[row][0]]
            wide = -(-rows[row] // TILE)
            parts.append(torch.nn.functional.pad(own, (0, max(wide - own.shape[2], 0)))[..., :wide])
        found.append(torch.cat(parts, 1))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("admission", "eviction"), [("all", "none"), ("gate", "none"), ("random", "at_end")]
)
def test_cuts_and_batches_choose_alike(chosen, admission, eviction, dtype):
    spec = CacheSpec(layers=2, heads=6, kv_heads=2, head_dim=8, page_size=4, dtype=dtype)
    sizes = Sizes(spec, window=6)
    pipeline = CachePipeline(
        admission=ADMISSIONS[admission](sizes),
        eviction=EVICTIONS[eviction](sizes),
        selection=PerPhase(
            prefill=XAttention(threshold=0.6, stride=2, tile=TILE), decode=Quest(budget=20)
        ),
        window=6,
    )
    rows = [83, 70]
    streams = streams_of(sizes, rows, 4, 5)

    def run(which, calls):
        chosen.clear()
        state = Run(pipeline, spec, [streams[n] for n in which], oracle=False)
        left = [rows[n] for n in which]
        for size in calls:
            now = [min(n, size) for n in left]
            if any(now):
                state.prompt(now)
            left = [n - c for n, c in zip(left, now, strict=True)]
        return [blocks_of(chosen, place, [rows[n] for n in which]) for place in range(len(which))]

    whole = run([0, 1], [100])
    others = [run([0, 1], cut) for cut in CUTS] + [[run([n], [100])[0] for n in (0, 1)]]
    assert all(0 < x.float().mean() < 0.55 for layers in whole for x in layers)
    for other in others:
        for mine, theirs in zip(whole, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_report_counts_what_calls_that_ended_read():
    spec = CacheSpec(layers=1, heads=4, kv_heads=2, head_dim=8, page_size=4, dtype=torch.float64)
    pipeline = CachePipeline(selection=XAttention(threshold=0.5, stride=2, tile=TILE), window=6)
    sizes = Sizes(spec, window=6)
    run = Run(pipeline, spec, streams_of(sizes, [60], 40, 5))
    assert pipeline.report(run.state).prompt_read == [None]
    run.prompt([6])  # all within the window
    assert pipeline.report(run.state).prompt_read == [None]
    run.prompt([50])
    first = pipeline.report(run.state).prompt_read
    assert 0 < first[0] < 1
    with pytest.raises(InterruptedError):
        run.prompt([20], 1)
    pipeline.abort(run.state)
    assert pipeline.report(run.state).prompt_read == first
    assert "XAttention on all layers: prompts read" in str(pipeline.report(run.state))
    assert pipeline.report(select_rows(run.state, [0])).prompt_read == [None]
    run.prompt([20])
    assert pipeline.report(run.state).prompt_read != first
    run.state.reset()
    assert pipeline.report(run.state).prompt_read == [None]


def test_a_sequence_without_queries_is_not_asked(monkeypatch):
    asked, prompt = [], XAttention.prompt
    monkeypatch.setattr(
        XAttention,
        "prompt",
        lambda self, view: asked.append(view.query.shape[1]) or prompt(self, view),
    )
    monkeypatch.setattr(XAttention, "choose", Selection.choose)
    spec = CacheSpec(layers=1, heads=2, kv_heads=1, head_dim=8, page_size=4)
    pipeline = CachePipeline(selection=XAttention(stride=2, tile=TILE), window=6)
    state = pipeline.init(spec, 3)
    for added in ([20, 0, 9], [0, 11, 0]):
        pipeline.begin(state, added, "prompt")
        pipeline.attend(state, 0, *(torch.randn(h, sum(added), 8) for h in (2, 1, 1)))
        pipeline.commit(state)
    assert asked == [20, 9, 11]
