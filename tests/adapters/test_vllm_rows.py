"""Rows and arenas of the vLLM adapter under a model of its scheduler, beside an oracle."""

from __future__ import annotations

import random
from types import SimpleNamespace

import attrs
import pytest
import torch

from kvpolicy import (
    AdmitAll,
    CachePipeline,
    DuoAttention,
    LocalAttention,
    Quest,
    RandomGate,
    Ratio,
    SnapKV,
)
from kvpolicy.adapters.vllm.plan import PAGE, check_rows, plan_of
from kvpolicy.adapters.vllm.prompt_end import Ends, hear
from kvpolicy.testing._spy import watch
from tests.support.adapters.arenas import SPEC, Engine, Request
from tests.support.contract.cases import Sizes, gate

DUO = DuoAttention(full_heads=((True, False), (False, True)), sinks=3, window=20)
ADMISSIONS = {
    "all": (CachePipeline(window=24), None),
    "local": (CachePipeline(admission=LocalAttention(window=16, sinks=20)), None),
    "duo": (CachePipeline(admission=DUO), None),
    "random": (CachePipeline(admission=RandomGate(sparsity=0.5, seed=1), window=8), 1.0),
    "gate": (CachePipeline(admission=gate(Sizes(SPEC, 16)), window=16), 0.9),
    "tight": (CachePipeline(admission=RandomGate(sparsity=0.2, seed=2), window=8), 0.25),
}


@pytest.mark.parametrize("name", ADMISSIONS)
def test_requests_that_share_blocks_are_served_as_if_alone(name):
    """Chunks, mixed batches, preemption, abort, and rows that are used again."""
    pipeline, admitted = ADMISSIONS[name]
    engine = Engine(pipeline, rows=3, blocks=9, admitted=admitted, captured=(1, 3))
    draw = random.Random(name)
    lengths = [90, 80, 1, 100, 17, 16]
    waiting = [Request(pipeline, n, seed) for seed, n in enumerate(lengths)]
    ended, preempted, mixed = 0, 0, 0
    while waiting or engine.running:
        batch, calm = [], engine.steps % 3 == 2  # those that have begun decode, no others come
        for request in [*engine.running, *([] if calm and engine.running else waiting)]:
            left = min(request.length - request.done, 40)
            decodes = left == 1 or (request.done and (calm or draw.random() < 0.4))
            n = 1 if decodes else draw.randint(1, left)
            while not engine.room_for(request, n) and request in engine.running:
                last = engine.running[-1]
                engine.end(last)
                last.restart()
                waiting.insert(0, last)
                batch = [pair for pair in batch if pair[0] is not last]
                preempted += 1
            if not request.blocks:
                break
            if request not in engine.running:
                engine.running.append(request)
                waiting.remove(request)
            batch.append((request, n))
        engine.step(batch)
        mixed += len({n == 1 for _, n in batch}) == 2
        for request in list(engine.running):
            if request.done == request.length or draw.random() < 0.01:
                engine.end(request)
                ended += 1
    assert ended == len(lengths) and mixed > 3 and engine.replays > 2
    assert len(engine.free) + len(engine.free_rows) == 8
    assert (engine.refused > 0) == (name == "tight")
    if name == "all":
        assert preempted


@pytest.mark.parametrize("name", ["duo", "random", "gate"])
def test_decoding_waits_for_nothing(name, monkeypatch):
    """So that it can be captured: neither the adapter's own steps nor a policy's ask the device."""
    pipeline, admitted = ADMISSIONS[name]
    pipeline = attrs.evolve(pipeline, selection=Quest(budget=64))
    engine = Engine(pipeline, rows=2, blocks=30, admitted=admitted)
    engine.running = [Request(pipeline, 40, seed) for seed in range(2)]
    assert all(engine.room_for(request, 30) for request in engine.running)
    engine.step([(request, 30) for request in engine.running])
    rows, real, calls = engine.rows, engine.rows.ops, []

    class Quiet:
        """Ops that a kernel computes do nothing."""

        def arena_write(self, *args, **options):
            calls.append(options["minmax"])

        def quest_select(self, pages, heads, query, budget, *rest):
            return heads.table[:, :, :budget]

        def paged_decode(self, query, *args, **options):
            return query

        def __getattr__(self, op):
            return getattr(real, op)

    monkeypatch.setattr(rows, "ops", Quiet())
    tokens = [torch.randn(2, n, 8, dtype=torch.float64) for n in (4, 2, 2, 2)]
    step = rows.rehearse(2)
    with watch() as seen:
        rows.decode(step, 0, *tokens)
    assert seen.syncs == [] and calls == [True]


def test_reading_prompts_waits_for_the_device_once_a_step(monkeypatch):
    """What the host then knows bounds the counts of every layer, which kernels take memory by."""
    pipeline, admitted = ADMISSIONS["random"]
    engine = Engine(pipeline, rows=2, blocks=30, admitted=admitted)
    rows, real, seen = engine.rows, engine.rows.ops, []

    class Reads:
        """Says what a layer's counts are beside what the host knew."""

        def prefill_attention(self, *args):
            heads, bounds = args[6], args[9]
            seen.append((heads.counts.tolist(), bounds))
            return real.prefill_attention(*args)

        def __getattr__(self, op):
            return getattr(real, op)

    monkeypatch.setattr(rows, "ops", Reads())
    engine.running = [Request(pipeline, 150, seed) for seed in range(2)]
    for n in (40, 60, 50):
        assert all(engine.room_for(request, n) for request in engine.running)
        engine.step([(request, n) for request in engine.running])
    assert len(seen) == 3 * 2 * 2
    for counts, (most, expected) in seen:
        for found, bound, guess in zip(*counts, *most, *expected, strict=True):
            assert found <= bound <= found + 60 and 0 <= guess <= bound
    with watch() as asked:
        step = rows.begin(torch.tensor([[1], [2]]), [150, 0], [1, 40])
    assert asked.syncs.count("tolist()") == 1 and len(step.prompts) == 1
    held = torch.tensor(step.prompts[0].held)
    assert not held.any() and held.shape == (2, 2)


def test_a_trial_without_blocks_leaves_no_trace():
    """vLLM's trials of long batches name no row, as padding does."""
    engine = Engine(CachePipeline(admission=DUO), rows=2, blocks=12)
    step = engine.rows.begin(torch.zeros(3, 4, dtype=torch.int32), [0, 0, 0], [1, 40, 40])
    assert step.decodes == 1 and step.prompts == ()
    assert not engine.rows.active.any()


def test_a_rehearsal_leaves_no_trace():
    engine = Engine(CachePipeline(admission=DUO), rows=2, blocks=12)
    rows = engine.rows
    before = [[x.clone() for x in (*y.ring, y.table, y.counts)] for y in rows.layers]
    tokens = [torch.randn(3, n, 8, dtype=torch.float64) for n in (4, 2, 2, 2)]
    out = rows.decode(rows.rehearse(3), 1, *tokens)
    after = [[*y.ring, y.table, y.counts] for y in rows.layers]
    assert not out.any()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_rows_whose_pages_lie_in_even_steps():
    """Keys and values share vLLM's memory, where such pages are read without a copy."""
    spec, pipeline = attrs.evolve(SPEC, kv_heads=1, heads=2), CachePipeline(window=8)
    engine = Engine(pipeline, rows=3, blocks=20, spec=spec)
    engine.running = [Request(pipeline, 40, seed, spec) for seed in range(3)]
    for n in (20, *[1] * 8):
        assert all(engine.room_for(request, n) for request in engine.running)
        engine.step([(request, n) for request in engine.running])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_of_a_decode_step_serves_any_requests():
    """Captured once for two rows, and replayed for those of the step, also where one is padding."""
    device = torch.device("cuda")
    spec = attrs.evolve(SPEC, dtype=torch.float32, head_dim=16, device=device)
    pipeline = CachePipeline(admission=DUO, backend="triton")
    engine = Engine(pipeline, rows=3, blocks=30, spec=spec, captured=(2,))
    rows, decode, graphs = engine.rows, engine.rows.decode, []
    for layer in range(spec.layers):
        given = [torch.zeros(2, n, 16, device=device) for n in (4, 2, 2, 2)]
        decode(rows.rehearse(2), layer, *given)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode(engine.captured[2], layer, *given)
        graphs.append((graph, given, out))

    def replay(step, layer, *new):
        graph, given, out = graphs[layer]
        for old, x in zip(given, new, strict=True):
            old.copy_(x)
        graph.replay()
        return out.clone()

    rows.decode = replay
    engine.running = [Request(pipeline, 80, seed, spec) for seed in range(3)]
    for added in [(30, 0, 25), *[(1, 0, 1)] * 20, (0, 40, 0), *[(0, 1, 1), (0, 1, 0)] * 6]:
        batch = [(r, n) for r, n in zip(engine.running, added, strict=True) if n]
        assert all(engine.room_for(request, n) for request, n in batch)
        engine.step(batch)
    assert engine.replays == 32


@pytest.mark.parametrize("name", ["tokens", "duo"])
def test_what_a_prompt_leaves_makes_room_for_what_is_generated(name):
    """Prompts in parts, decoding in the pages that were given back, and requests that begin again,
    whose prompts then end inside a part."""
    pipeline = {
        "tokens": CachePipeline(eviction=SnapKV(budget=30, observation=6), window=10),
        "duo": CachePipeline(admission=DUO, eviction=SnapKV(budget=Ratio(0.4), observation=4)),
    }[name]
    engine = Engine(pipeline, rows=2, blocks=11, captured=(1, 2))
    draw = random.Random(name)
    waiting = [
        Request(pipeline, length, seed, prompt=prompt)
        for seed, (prompt, length) in enumerate([(60, 90), (45, 60), (1, 20)])
    ]
    straddled = 0
    while waiting or engine.running:
        batch = []
        for request in [*engine.running, *waiting]:
            n = request.part(min(request.length - request.done, draw.randint(1, 40)))
            left = request.prompt - request.done
            if request.prompt == 45 and left > 0 and not request.straddles:
                n = min(n, max(left - 8, 1))  # the last ones one by one
            if not engine.room_for(request, n):
                if request not in engine.running:
                    break
                continue
            if request not in engine.running:
                engine.running.append(request)
                waiting.remove(request)
            straddled += request.straddles and request.done < request.prompt < request.done + n
            batch.append((request, n))
        engine.step(batch)
        for request in list(engine.running):
            if request.done == request.length:
                dense = engine.plan.blocks(request.length)
                assert len(request.blocks) < dense or request.prompt < 60
                engine.end(request)
            elif request.done > request.prompt + 9 and not request.straddles:
                engine.end(request)
                request.restart()
                waiting.insert(0, request)
    assert straddled > 1 and engine.refused == 0 and engine.replays > 9
    assert len(engine.free) + len(engine.free_rows) == 10


def test_a_prompts_end_waits_for_nothing(monkeypatch):
    pipeline = CachePipeline(eviction=SnapKV(budget=30, observation=6), window=10)
    engine = Engine(pipeline, rows=1, blocks=12)
    request = Request(pipeline, 60, 0, prompt=60)
    engine.running.append(request)
    assert engine.room_for(request, 60)
    engine.step([(request, 60)])
    rows = engine.rows
    ops = SimpleNamespace(
        window_scores=lambda pages, heads, *args, **options: heads.table.repeat(1, 1, 16).double(),
        keep_best=lambda scores, valid, amount: valid & (valid.cumsum(2) <= amount[..., None]),
        move_kept=lambda *args: None,
    )
    monkeypatch.setattr(rows, "ops", ops)
    with watch() as seen:
        hear(rows, Ends({}, {1: len(request.blocks)}, (1,)))
    assert {sync.partition("(")[0] for sync in seen.syncs} == {"torch.tensor"}  # sent, not read


def test_an_arena_that_grows_admits_again():
    """Tokens that found no page stay away; later ones are admitted in blocks that came since."""
    pipeline, admitted = ADMISSIONS["tight"]
    engine = Engine(pipeline, rows=1, blocks=30, admitted=admitted)
    request = Request(pipeline, 150, 0)
    engine.running.append(request)
    counts = []
    for n in (120, *[1] * 30):
        assert engine.room_for(request, n)
        engine.step([(request, n)])
        counts.append(int(engine.rows.layers[0].counts[1].sum()))
    assert engine.refused > 100 and counts[-1] > counts[0]


def test_kernels_find_pages_in_vllms_memory():
    """A few steps of the Triton backend: prompts, chunks, decoding, and both in one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = attrs.evolve(SPEC, dtype=torch.float32, head_dim=16, layers=1, device=device)
    streams = DuoAttention(full_heads=((True, False),), sinks=3, window=16)
    pipeline = CachePipeline(admission=streams, backend="triton")
    engine = Engine(pipeline, rows=2, blocks=12, spec=spec)
    engine.running = [Request(pipeline, 60, seed, spec) for seed in range(2)]
    for counts in [(30, 0), (1, 40), (1, 1), (20, 1)]:
        batch = [(r, n) for r, n in zip(engine.running, counts, strict=True) if n]
        assert all(engine.room_for(request, n) for request, n in batch)
        engine.step(batch)


def stored(admission, layer, head, tokens):
    """Tokens of a head among the first that left the window, one after the other."""
    if isinstance(admission, AdmitAll):
        return tokens
    if isinstance(admission, DuoAttention) and admission.full_heads[layer][head]:
        return tokens
    return sum(at < admission.sinks for at in range(tokens))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("block", [16, 48])
@pytest.mark.parametrize("name", ["all", "local", "duo"])
def test_blocks_are_counted_by_what_heads_store(name, block, ranks):
    admission, window = ADMISSIONS[name][0].admission, ADMISSIONS[name][0].window
    if name == "duo":
        rows = ((True, False, False, True), (True, True, False, False), (True,) * 4)
        admission = DuoAttention(full_heads=rows, sinks=20, window=window)
    layers, heads = 3, 4
    plan = plan_of(admission, window, layers, heads, ranks, block, None)
    for length in [1, window, window + 1, 40, 57, 58, 59, 100, 333]:
        need = []
        for rank in range(ranks):
            pages = 0
            for layer in range(layers):
                for head in range(rank * heads // ranks, (rank + 1) * heads // ranks):
                    tokens = stored(admission, layer, head, max(length - window, 0))
                    pages += len(range(0, tokens, PAGE))
            need.append(pages)
        each = layers * heads // ranks * block // PAGE
        blocks = next(n for n in range(1, 1000) if n * each >= max(need))
        assert plan.blocks(length) == blocks
    assert plan.exact


def test_a_share_leaves_room_for_last_pages_and_is_never_above_all():
    gate = RandomGate(sparsity=0.5)
    plan = plan_of(gate, 8, 4, 2, 1, 16, 0.25)
    everything = plan_of(AdmitAll(), 8, 4, 2, 1, 16, None)
    for length in range(1, 400):
        left = max(length - 8, 0)
        assert plan.blocks(length) <= everything.blocks(length)
        assert plan.pages(length) * PAGE >= min(8 * left, 2 * left + 8 * (left > 0))
    assert plan.blocks(400) < everything.blocks(400) / 3 and not plan.exact


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"block": 24}, ValueError, "block_size: wanted a multiple of 16, got 24"),
        ({"ranks": 3}, ValueError, "tensor_parallel_size: wanted a divisor of the 4 KV heads"),
        ({"admitted": None}, ValueError, "admitted: RandomGate decides on the device"),
        ({"admitted": 0}, ValueError, r"admitted: wanted a number in \(0, 1\], got 0"),
        ({"admitted": float("nan")}, ValueError, r"admitted: wanted a number in \(0, 1\], got nan"),
        ({"admitted": "much"}, TypeError, "admitted: wanted a number in"),
        ({"admission": DUO, "admitted": 0.5}, ValueError, "DuoAttention has an exact number"),
    ],
)
def test_numbers_that_make_no_plan(change, error, says):
    given = {
        "admission": RandomGate(sparsity=0.5), "window": 8, "layers": 2, "kv_heads": 4, "ranks": 1,
        "block": 16, "admitted": 0.5,
    }  # fmt: skip
    with pytest.raises(error, match=says):
        plan_of(**(given | change))


def test_rows_that_fit_beside_blocks():
    check_rows(9, 100, 0.1, 10_000)
    with pytest.raises(ValueError, match="10 rows .* more than 0.1 .*; wanted at most 9 "):
        check_rows(10, 100, 0.1, 10_000)
    with pytest.raises(ValueError, match="wanted at most 0 "):
        check_rows(1, 100, 0.1, 500)


@pytest.mark.parametrize("name", ["all", "duo", "gate"])
def test_what_reading_takes_is_known_before(name):
    """Gathered tokens and copies of queries of the longest prompt's last part."""
    pipeline, admitted = ADMISSIONS[name]
    engine = Engine(pipeline, rows=1, blocks=60, admitted=admitted)
    request = Request(pipeline, 200, 0)
    engine.running.append(request)
    assert engine.room_for(request, 200)
    engine.step([(request, 200)])
    rows, (_, heads, dim) = engine.rows, engine.rows.layers[0].ring.k[:, :, 0].shape
    stored = max(int(layer.counts.sum()) for layer in rows.layers) * dim * 2
    copies = 4 * 200 * rows.spec.heads * dim
    known = rows.scratch(200) / 8
    assert heads == 2 and stored + copies <= known < 2 * (stored + copies) + 2000


def test_rows_count_their_memory():
    none = Engine(CachePipeline(admission=DUO), rows=0, blocks=12).rows
    engine = Engine(CachePipeline(admission=DUO), rows=4, blocks=12)
    tensors = [t for layer in engine.rows.layers for t in (*layer.ring, layer.table, layer.counts)]
    rows = engine.rows
    tensors += [*rows.arenas[:4], rows.lengths, rows.active, rows.batch, rows.positions, rows.begun]
    assert rows.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert all(t.shape[0] == 5 for t in tensors) and rows.nbytes == 5 * none.nbytes
    torch.testing.assert_close(rows.pages.k.shape[0], 12 * rows.plan.pages_per_block)
