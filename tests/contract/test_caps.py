"""The cap on tokens: never exceeded while decoding; what the eviction scores lowest goes."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CapacityError, KeepAll
from tests.support.contract.capped import (
    DIM,
    INTERVAL,
    KV_HEADS,
    LAYERS,
    SPEC,
    WINDOW,
    Feed,
    Taste,
    taste,
)
from tests.support.contract.contents import digest


class Model:
    """One head of every layer as a list of positions; all heads are alike where all is admitted."""

    def __init__(self, cap):
        self.cap, self.length, self.steps, self.overshoot, self.dropped = cap, 0, 0, 0, 0
        self.far = [[] for _ in range(LAYERS)]

    def near(self):
        return list(range(max(self.length - WINDOW, 0), self.length))

    def grow(self):
        left, self.length = self.length - WINDOW, self.length + 1
        if left >= 0:
            for far in self.far:
                far.append(left)

    def shrink(self, most):
        for layer, far in enumerate(self.far):
            best = sorted(far, key=lambda p: (taste(p, layer), p), reverse=True)
            kept = sorted(best[: max(most - len(self.near()), 0)])
            self.dropped += KV_HEADS * (len(far) - len(kept))
            self.far[layer] = kept

    def prompt(self, tokens):
        for _ in range(tokens):
            self.grow()
        self.overshoot = max(self.overshoot, len(self.far[0]) + len(self.near()) - self.cap)
        self.shrink(self.cap)
        self.steps = 0

    def decode(self):
        if not self.steps:
            if len(self.far[0]) + len(self.near()) > self.cap - INTERVAL:
                self.shrink(self.cap - INTERVAL)
            self.steps = INTERVAL
        self.steps -= 1
        self.grow()


def test_the_token_cap_keeps_the_best_tokens_of_every_head():
    cap = 30
    spec = attrs.evolve(SPEC, max_tokens=cap, at_cap="evict")
    run = Feed(CachePipeline(window=WINDOW, eviction=Taste()), spec, batch=2)
    models = [Model(cap), Model(cap)]
    for added in ([5, 20], [40, 33], [13, 1]):
        run.call(added, "prompt")
        for model, tokens in zip(models, added, strict=True):
            model.prompt(tokens)
    run.pipeline.end_prompt(run.state)
    for _ in range(50):
        run.call([1, 1], "decode")
        for row, model in enumerate(models):
            model.decode()
            for layer in range(LAYERS):
                for head in range(KV_HEADS):
                    kept = run.state.kept(layer, row, head).tolist()
                    assert kept == model.far[layer] + model.near()
                    assert len(kept) <= cap
    report = run.pipeline.report(run.state)
    assert report.overshoot == max(model.overshoot for model in models) > 0
    assert report.cap_evicted == sum(model.dropped for model in models) > 0


def test_decoding_at_the_token_cap_attends_to_what_is_kept():
    spec = attrs.evolve(SPEC, max_tokens=20, at_cap="evict")
    run = Feed(CachePipeline(window=WINDOW, eviction=Taste()), spec)
    past = [[] for _ in range(LAYERS)]
    _, news = run.call([35], "prompt")
    for layer, (_, k, v) in enumerate(news):
        past[layer] = [k, v]
    run.pipeline.end_prompt(run.state)
    for _ in range(12):
        outs, news = run.call([1], "decode")
        for layer, (q, k, v) in enumerate(news):
            past[layer] = [torch.cat(pair, 1) for pair in zip(past[layer], (k, v), strict=True)]
            for head in range(spec.heads):
                kv = head // spec.group
                kept = run.state.kept(layer, 0, kv)
                keys, values = (x[kv, kept] for x in past[layer])
                weights = (keys @ q[head, 0] * DIM**-0.5).softmax(0)
                torch.testing.assert_close(outs[layer][0, head, 0], weights @ values)
    assert run.pipeline.report(run.state).cap_evicted > 0


def test_without_eviction_the_token_cap_refuses_and_changes_nothing():
    spec = attrs.evolve(SPEC, max_tokens=30)
    run = Feed(CachePipeline(window=WINDOW), spec)
    run.call([25], "prompt")
    before = digest(run.state)
    with pytest.raises(CapacityError, match="max_tokens: .* would hold 31 tokens in layer 0"):
        run.call([6], "prompt")
    run.pipeline.abort(run.state)
    assert digest(run.state) == before
    for _ in range(5):
        run.call([1], "decode")
    assert run.longest() == 30
    before = digest(run.state)
    with pytest.raises(CapacityError, match="max_tokens: .* would hold 31 tokens"):
        run.call([1], "decode")
    assert digest(run.state) == before


def test_finished_sequences_do_not_hold_up_the_others_at_the_cap():
    run = Feed(CachePipeline(window=WINDOW), attrs.evolve(SPEC, max_tokens=30), batch=2)
    run.call([30, 10], "prompt")
    run.state.finish([0])
    run.call([1, 1], "decode")
    assert run.state.lengths == [30, 11]
    run.state.resume()
    with pytest.raises(CapacityError, match="sequence 0"):
        run.call([1, 1], "decode")


def test_a_finished_sequence_loses_nothing_to_the_cap_of_the_others():
    spec = attrs.evolve(SPEC, max_tokens=30, at_cap="evict")
    run = Feed(CachePipeline(window=WINDOW, eviction=Taste()), spec, batch=2)
    run.call([30, 30], "prompt")
    run.pipeline.end_prompt(run.state)
    run.state.finish([0])
    for _ in range(9):
        run.call([1, 1], "decode")
    assert run.state.kept(0, 0, 0).tolist() == list(range(30))
    assert run.state.sequences[0].cap_evicted == 0 < run.state.sequences[1].cap_evicted


def test_caps_that_cannot_work_are_refused():
    capped = attrs.evolve(SPEC, max_tokens=30, at_cap="evict")
    with pytest.raises(ValueError, match="at_cap: 'evict' wants an eviction .* got KeepAll"):
        CachePipeline(window=WINDOW, eviction=KeepAll()).init(capped)
    with pytest.raises(ValueError, match="max_tokens: wanted at least 10 .* got 9"):
        CachePipeline(window=WINDOW, eviction=Taste()).init(attrs.evolve(capped, max_tokens=9))
    with pytest.raises(ValueError, match="max_tokens: wanted at least 7 .* got 6"):
        CachePipeline(window=WINDOW).init(attrs.evolve(SPEC, max_tokens=6))
    with pytest.raises(ValueError, match="at_cap: wanted .* got 'drop'"):
        attrs.evolve(SPEC, at_cap="drop")
