"""The contract, one property per item, on random sizes, policies and calls."""

from __future__ import annotations

import random

import attrs
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kvpolicy import CachePipeline
from tests.support.contract.cases import EXACT, NAMES, SMALL, build, caches, seeds
from tests.support.contract.contents import contents
from tests.support.contract.driver import Run, feed, stream, streams_of
from tests.support.contract.examples import examples


def assert_same(one, other, rows=None):
    """Two caches hold the same: kept sets, page contents, summaries, rings, queries, bit by bit."""
    for row in rows or range(one.state.batch):
        for layer in range(one.spec.layers):
            pair = zip(
                contents(one.state, layer, row), contents(other.state, layer, row), strict=True
            )
            for h, (a, b) in enumerate(pair):
                assert a.keys() == b.keys()
                for name in a:
                    assert torch.equal(a[name], b[name]), (name, row, layer, h)
                kept = [x.state.kept(layer, row, h) for x in (one, other)]
                assert torch.equal(*kept)


@examples(25, 100, caches(), seeds)
def test_neutral_is_dense_causal_attention(sizes, seed):
    spec, length = sizes.spec, sizes.length
    tokens = stream(spec, length, seed)
    pipeline, n = CachePipeline(window=sizes.window), length - 5
    state, outs = pipeline.init(spec), []
    calls = [("prompt", n // 2), ("prompt", n - n // 2), *[("decode", 1)] * 5]
    done = 0
    for phase, count in calls:
        pipeline.begin(state, [count], phase)
        for layer, parts in enumerate(tokens):
            q, k, v, pre = (x[:, done : done + count] for x in parts)
            if phase == "decode":
                q, k, v, pre = q[None], k[None], v[None], pre[None]
            out = pipeline.attend(state, layer, q, k, v, key_pre=pre)
            outs.append((layer, done, out[0] if phase == "decode" else out))
        pipeline.commit(state)
        done += count
    at = torch.arange(length)
    for layer, (q, k, v, _) in enumerate(tokens):
        slides = spec.slides(layer) or length
        mask = (at <= at[:, None]) & (at[:, None] - at < slides)
        full = [
            x.double().repeat_interleave(n, 0)[None]
            for x, n in ((q, 1), (k, spec.group), (v, spec.group))
        ]
        exact = F.scaled_dot_product_attention(*full, attn_mask=mask, scale=spec.softmax_scale)[0]
        low = [x.to(spec.dtype) for x in full]
        eager = F.scaled_dot_product_attention(*low, attn_mask=mask, scale=spec.softmax_scale)[0]
        budget = 2 * (eager - exact).abs().max() + max(2 * torch.finfo(spec.dtype).eps, 1e-13)
        for which, start, out in outs:
            if which == layer:
                assert (out - exact[:, start : start + out.shape[1]]).abs().max() <= budget
        if spec.slides(layer) is None:
            kept = [state.kept(layer, 0, h).tolist() for h in range(spec.kv_heads)]
            assert kept == [list(range(length))] * spec.kv_heads


@examples(
    10, 100, caches(dtypes=EXACT, page_sizes=SMALL), st.tuples(*map(st.sampled_from, NAMES)), seeds
)
def test_triples(sizes, names, seed):
    """Any three policies, ragged batches, random cuts, two turns, single and verify calls."""
    pipeline, rng = build(sizes, *names), random.Random(seed)
    rows = [sizes.length, sizes.length + rng.randint(0, 9)]
    run = Run(pipeline, sizes.spec, streams_of(sizes, rows, 40, seed))
    feed(run, rows, seed, rng.choice([3, 20, 200]))
    for _ in range(9):
        run.decode()
    run.check_effect()
    run.check()
    run.prompt([0, 7])
    run.end_prompt()
    columns = rng.randint(2, 5)
    run.decode([[rng.random() < 0.7 for _ in range(columns)] for _ in rows])
    run.decode()
    run.check()


@examples(
    5, 100, caches(dtypes=EXACT, page_sizes=SMALL), st.tuples(*map(st.sampled_from, NAMES)), seeds
)
def test_any_cut_stores_the_same(sizes, names, seed):
    pipeline = build(sizes, *names)
    rows = [sizes.length, sizes.length + 3]
    streams = streams_of(sizes, rows, 9, seed)
    runs = [Run(pipeline, sizes.spec, streams) for _ in range(3)]
    for longest, run in zip((1 << 20, 9, sizes.length // 2), runs, strict=True):
        if longest > 1 << 10:
            run.prompt(rows)
            run.end_prompt()
        else:
            feed(run, rows, seed, longest)
        if run is not runs[0]:
            assert_same(runs[0], run)
    for run in runs:
        for _ in range(4):
            run.decode()
        run.check()
    runs[0].check_effect()


@examples(30, 100, caches(), st.sampled_from(NAMES[0]), st.integers(1, 12), seeds)
def test_prompt_and_decode_calls_store_the_same(sizes, admission, decoded, seed):
    """Without eviction a token's fate does not depend on the phase of its call."""
    pipeline = build(sizes, admission)
    streams = streams_of(sizes, [sizes.length], 0, seed)
    one, other = (Run(pipeline, sizes.spec, streams) for _ in range(2))
    one.prompt([sizes.length])
    other.prompt([sizes.length - decoded])
    for _ in range(decoded):
        other.decode()
    assert_same(one, other)
    one.check()
    one.check_effect()


@examples(
    8, 100, caches(dtypes=EXACT, page_sizes=SMALL), st.tuples(*map(st.sampled_from, NAMES)), seeds
)
def test_batch_gives_what_each_gets_alone(sizes, names, seed):
    pipeline, rng = build(sizes, *names), random.Random(seed)
    short = sizes.length if "ratio" in names else rng.choice([1, sizes.window, sizes.window + 1])
    rows = [sizes.length + 5, short, sizes.length]
    streams = streams_of(sizes, rows, 16, seed)
    batch = Run(pipeline, sizes.spec, streams)
    feed(batch, rows, seed, 30)
    ended = rng.randrange(3)
    for step in range(12):
        if step == 6:
            batch.state.finish([ended])
        batch.decode()
    batch.check()
    batch.check_effect()
    for row, n in enumerate(rows):
        alone = Run(pipeline, sizes.spec, streams[row : row + 1], oracle=False)
        alone.middle = max(rows) // 2
        alone.prompt([n])
        alone.end_prompt()
        for _ in range(6 if row == ended else 12):
            alone.decode()
        for layer in range(sizes.spec.layers):
            mine, theirs = contents(batch.state, layer, row), contents(alone.state, layer, 0)
            for a, b in zip(mine, theirs, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)


@examples(5, 100, caches(), st.sampled_from(NAMES[0]), st.sampled_from(NAMES[1]), seeds)
def test_verify_calls_are_single_steps(sizes, admission, selection, seed):
    """Columns of a call select for themselves; those that are not real leave no trace."""
    pipeline, rng = build(sizes, admission, selection), random.Random(seed)
    rows = [sizes.length, sizes.length + 2]
    streams = streams_of(sizes, rows, 30, seed)
    one, other = (Run(pipeline, sizes.spec, streams) for _ in range(2))
    for run in (one, other):
        run.prompt(rows)
    for _ in range(3):
        columns = rng.randint(0, sizes.spec.rollback + 3)
        one.decode([[True] + [rng.random() < 0.6 for _ in range(columns)] for _ in rows])
    for _ in range(max(one.at) - rows[0]):
        wanted = [now < end for now, end in zip(other.at, one.at, strict=True)]
        other.decode([[on] for on in wanted])
    assert other.at == one.at
    assert_same(one, other)
    one.check()
    one.check_effect()


@examples(10, 100, caches(page_sizes=SMALL), st.tuples(*map(st.sampled_from, NAMES)), seeds)
def test_finished_sequences_store_nothing(sizes, names, seed):
    pipeline = build(sizes, names[0], names[1])
    rows = [sizes.length, sizes.length]
    run = Run(pipeline, sizes.spec, streams_of(sizes, rows, 12, seed))
    run.prompt(rows)
    before = [contents(run.state, layer, 0) for layer in range(sizes.spec.layers)]
    run.state.finish([0])
    for _ in range(6):
        run.decode()
    run.decode([[True, True]] * 2)
    for layer, heads in enumerate(before):
        for a, b in zip(heads, contents(run.state, layer, 0), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert run.at == [rows[0], rows[1] + 8]
    run.check()
    run.check_effect()


@examples(15, 100, caches(sliding=False), st.sampled_from([1, 3, 8, 21]), seeds)
def test_layers_that_slide_have_no_pages(sizes, slides, seed):
    spec = attrs.evolve(sizes.spec, sliding=[slides] * sizes.spec.layers)
    rows = [sizes.length, 3]
    run = Run(CachePipeline(window=sizes.window), spec, streams_of(sizes, rows, 5, seed))
    feed(run, rows, seed, 17)
    for _ in range(5):
        run.decode()
    run.check()
    report = run.pipeline.report(run.state)
    assert report.sliding_layers == list(range(spec.layers))
    assert report.admitted == [None] * spec.layers
    assert report.pages == 0
