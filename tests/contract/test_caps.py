"""Caps: never exceeded while decoding; what goes is what the eviction scores lowest."""

from __future__ import annotations

import attrs
import pytest
import torch
from contents import digest

from kvpolicy import CachePipeline, CacheSpec, CapacityError, KeepAll, RandomGate, Tokens
from kvpolicy.eviction import Eviction
from kvpolicy.store.rows import select_rows

WINDOW, INTERVAL, LAYERS, KV_HEADS, DIM = 6, 4, 2, 2, 8
SPEC = CacheSpec(
    layers=LAYERS, heads=4, kv_heads=KV_HEADS, head_dim=DIM, page_size=4, rollback=5,
    interval=INTERVAL, dtype=torch.float64,
)  # fmt: skip


def taste(position, layer):
    """Scores with many ties, in no order."""
    return (position * 7 + 3 * layer) % 11


@attrs.frozen(kw_only=True)
class Taste(Eviction):
    """Evicts only because a cap asks for it."""

    budget = Tokens(10_000)

    def score(self, view):
        return taste(view.positions, view.layer).double()


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


class Run:
    """A pipeline fed with random tokens, and what they were."""

    def __init__(self, pipeline, spec, batch=1, seed=0):
        self.pipeline, self.state = pipeline, pipeline.init(spec, batch)
        self.make = torch.Generator().manual_seed(seed)
        self.seen = [[] for _ in range(batch)]  # [row] -> [layer][position] of key, value

    def call(self, added, phase):
        spec, state, total = self.state.spec, self.state, sum(added)
        self.pipeline.begin(state, added, phase)
        outs, news = [], []
        for layer in range(spec.layers):
            q, k, v = (
                torch.randn(h, total, DIM, generator=self.make, dtype=spec.dtype).to(spec.device)
                for h in (spec.heads, KV_HEADS, KV_HEADS)
            )
            tensors = (q, k, v)
            if phase == "decode":
                tensors = tuple(x.transpose(0, 1)[:, :, None] for x in tensors)
            outs.append(self.pipeline.attend(state, layer, *tensors))
            news.append((q, k, v))
        self.pipeline.commit(state)
        return outs, news

    def held(self):
        report = self.pipeline.report(self.state)
        return report.pages + report.reserved + report.positions + report.summaries

    def longest(self):
        spec = self.state.spec
        return max(
            len(self.state.kept(layer, row, head))
            for layer in range(spec.layers)
            for row in range(self.state.batch)
            for head in range(spec.kv_heads)
        )


def test_the_token_cap_keeps_the_best_tokens_of_every_head():
    cap = 30
    spec = attrs.evolve(SPEC, max_tokens=cap, at_cap="evict")
    run = Run(CachePipeline(window=WINDOW, eviction=Taste()), spec, batch=2)
    models = [Model(cap), Model(cap)]
    for added in ([5, 20], [13, 1], [40, 33]):
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
    run = Run(CachePipeline(window=WINDOW, eviction=Taste()), spec)
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
    run = Run(CachePipeline(window=WINDOW), spec)
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
    run = Run(CachePipeline(window=WINDOW), attrs.evolve(SPEC, max_tokens=30), batch=2)
    run.call([30, 10], "prompt")
    run.state.finish([0])
    run.call([1, 1], "decode")
    assert run.state.lengths == [30, 11]
    run.state.resume()
    with pytest.raises(CapacityError, match="sequence 0"):
        run.call([1, 1], "decode")


def test_a_finished_sequence_loses_nothing_to_the_cap_of_the_others():
    spec = attrs.evolve(SPEC, max_tokens=30, at_cap="evict")
    run = Run(CachePipeline(window=WINDOW, eviction=Taste()), spec, batch=2)
    run.call([30, 30], "prompt")
    run.pipeline.end_prompt(run.state)
    run.state.finish([0])
    for _ in range(9):
        run.call([1, 1], "decode")
    assert run.state.kept(0, 0, 0).tolist() == list(range(30))
    assert run.state.cap_evicted[0] == 0 < run.state.cap_evicted[1]


def page_bytes(pipeline, spec):
    return next(iter(pipeline.init(spec).pools.values())).page_bytes


@pytest.mark.parametrize(
    ("backend", "pages", "chunks", "steps"), [("reference", 192, 9, 70), ("triton", 64, 3, 8)]
)
def test_the_byte_cap_makes_room(backend, pages, chunks, steps):
    pipeline = CachePipeline(window=WINDOW, eviction=Taste(), backend=backend)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    spec = attrs.evolve(SPEC, dtype=torch.float32, device=torch.device(device))
    most = pages * page_bytes(pipeline, spec)
    spec = attrs.evolve(spec, max_bytes=most, at_cap="evict")
    run = Run(pipeline, spec, batch=2)
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
    run = Run(pipeline, spec)
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
    run = Run(pipeline, spec)
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
    run = Run(pipeline, spec)
    run.call([126], "prompt")  # 4 heads of 30 pages, all of them shared below
    run.pipeline.end_prompt(run.state)
    fork = Run(pipeline, spec)
    fork.state = select_rows(run.state, [0])
    fork.call([1], "decode")
    before = digest(run.state)
    with pytest.raises(CapacityError):
        run.call([1], "decode")
    assert digest(run.state) == before


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


def test_a_prompt_call_that_admits_little_needs_no_room_for_all_of_it():
    parts = {"admission": RandomGate(sparsity=0.9), "eviction": Taste()}
    pipeline = CachePipeline(window=WINDOW, **parts)
    spec = attrs.evolve(SPEC, max_bytes=128 * page_bytes(pipeline, SPEC), at_cap="evict")
    run = Run(pipeline, spec)
    run.call([600], "prompt")
    assert pipeline.report(run.state).cap_evicted == 0
    run.call([600], "prompt")
    assert run.state.lengths == [1200]
