"""An eviction round of SnapKV over full layers, and its parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import Tokens, budget_of
from ..calls.evict import evict
from ..calls.score import score, view
from ..eviction import EvictionView, SnapKV
from ..pipeline import CachePipeline
from ..spec import CacheSpec
from ..store import CacheState, compaction
from ..store.moments import summed_at
from .context import Bench, Case, check
from .rows import Goal, Row
from .timing import median_ms

ROUNDS = 3  # whole rounds, each over a fresh cache


def full_state(
    bench: Bench, pipeline: CachePipeline, layers: int, heads: int, kv_heads: int, held: int
) -> CacheState:
    """Layers whose heads store `held` random tokens each, at positions 0, 1, ..."""
    dim = bench.pick(128, 32)
    spec = CacheSpec(
        layers=layers, heads=heads, kv_heads=kv_heads, head_dim=dim, dtype=bench.dtype,
        device=bench.device,
    )  # fmt: skip
    state = pipeline.init(spec)
    pool, size = state.layers[0].pool, spec.page_size
    row = state.sequences[0]
    row.length = held + state.layers[0].window
    row.summed = summed_at(row.length, spec.rollback)
    state.widen(held)
    state.sync_devices()
    pages = -(-held // size)
    ids = pool.take(layers * kv_heads * pages).view(layers, kv_heads, pages)
    for layer, own in zip(state.layers, ids, strict=True):
        layer.table[0, :, :pages] = own
        layer.counts.fill_(held)
        for tensor in (layer.ring.k, layer.ring.v, layer.queries, layer.query_ring):
            if tensor is not None:
                tensor.normal_()
        for number in layer.numbers or ():
            number.uniform_()
        if layer.query_products is not None:  # queries of mean 0 and deviation 1
            layer.query_products.copy_(torch.eye(dim, device=bench.device) * held)
    first = torch.zeros(pool.capacity, dtype=torch.int32, device=bench.device)
    first[ids.long()] = torch.arange(pages, dtype=torch.int32, device=bench.device) * size
    base, slot = 0, torch.arange(size, dtype=torch.int32, device=bench.device)
    for k, v, meta, _ in pool.extents:
        k.normal_()
        v.normal_()
        meta.copy_(first[base : base + meta.shape[0], None] + slot)
        base += meta.shape[0]
    return state


def exact_scores(policy: SnapKV, view: EvictionView) -> torch.Tensor:
    """Scores `[N]` of the first KV head in float64, written out."""
    assert view.queries is not None
    group, w = view.queries.shape[1] // view.keys.shape[1], view.queries.shape[2]
    at = view.lengths[0] - w + torch.arange(w, device=view.keys.device)
    near = view.lengths[0] - view.recent_keys.shape[2]
    recent = near + torch.arange(view.recent_keys.shape[2], device=view.keys.device)
    where = torch.cat([view.positions[0, 0], recent])
    there = torch.cat([view.valid[0, 0], view.recent_valid[0]])
    keys = torch.cat([view.keys[0, 0], view.recent_keys[0, 0]]).double()
    mass = torch.zeros(view.keys.shape[2], dtype=torch.float64, device=keys.device)
    for q in view.queries[0, :group].double():
        logits = q @ keys.T * view.scale
        seen = (where <= at[:, None]) & there
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        mass += weights[:, : mass.shape[0]].sum(0) / (group * w)
    mass = mass.masked_fill(~view.valid[0, 0], 0)
    return F.avg_pool1d(mass[None], policy.kernel, 1, policy.kernel // 2)[0]


def snapkv(bench: Bench, case: str) -> Iterator[Row]:
    """Whole rounds of all layers, with their peak scratch; then the parts."""
    layers, heads, kv_heads = bench.pick(32, 1), bench.pick(32, 4), bench.pick(8, 2)
    held, window = bench.pick(100_000, 120), bench.pick(256, 16)
    policy = SnapKV(budget=Tokens(bench.pick(32768, 64)), observation=window)
    pipeline = CachePipeline(eviction=policy, window=window, backend="triton")

    def make(count: int) -> CacheState:
        return full_state(bench, pipeline, count, heads, kv_heads, held)

    state = make(1)
    scores, _ = score(state, state.layers[0], held)
    exact = exact_scores(policy, view(state, state.layers[0], held))
    check(case, scores[0, 0], exact)
    del scores, exact
    rounds = bench.pick(ROUNDS + 1, 1)
    times, scratch = zip(*[round_of(bench, make(layers)) for _ in range(rounds)], strict=True)
    ms = statistics.median(times[1:] or times)  # the first one compiles
    # q.k twice: once for the softmax' sums, once for the weights; keys are read as often.
    flops = layers * 2 * 2.0 * state.spec.head_dim * heads * window * held
    moved = layers * 2 * 2.0 * state.spec.head_dim * kv_heads * held
    yield Row(
        group="snapkv", name=case, value=ms, rate=flops / ms / 1e9, rate_unit="TFLOP/s",
        floor=bench.floor_ms(flops, moved), shape=f"{held} stored a head, w={window}, x{layers}",
        goals=(
            Goal(what="ms", wanted=60, got=ms),
            Goal(what="scratch MB", wanted=256, got=max(scratch) / 1e6),
        ),
        note=f"all layers, pages given back; median of {ROUNDS}",
        extra={"scratch_bytes": max(scratch)},
    )  # fmt: skip
    del state
    for name, (took, least, note) in _parts(bench, make(layers), held).items():
        yield Row(
            group="snapkv", name=f"{case}: {name}", value=took, rate=least / took / 1e9,
            rate_unit="TB/s", floor=bench.floor_ms(moved=least), note=note,
        )  # fmt: skip


def round_of(bench: Bench, state: CacheState) -> tuple[float, int]:
    """Milliseconds on the host's clock and bytes of scratch of one eviction."""
    cuda, before = bench.device.type == "cuda", 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    evict(state, [True])
    if cuda:
        torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - start)
    return took, torch.cuda.max_memory_allocated() - before if cuda else 0


def _parts(bench: Bench, state: CacheState, held: int) -> dict[str, tuple[float, float, str]]:
    """Milliseconds of each part for all layers, the bytes it has to move, what was measured."""
    layer, pool, layers = state.layers[0], state.layers[0].pool, len(state.layers)
    budget = budget_of(layer.eviction)
    assert budget is not None
    scores, valid = score(state, layer, held)
    limit = budget.allowed(state.lengths[0], layer.window, 0, 1)
    target = torch.full_like(layer.counts, limit)
    best = state.ops.keep_best

    def choose() -> Tensor:
        return budget.keep(scores, valid, target, layer.window, best)

    keep = choose()
    mutable = [y for x in state.layers for y in (x.table, x.counts, x.evicted)]
    mutable += [pool.free, pool.top, pool.refs]
    saved = [x.clone() for x in mutable]

    def restore() -> None:
        """What lies in the pages does not matter to the time."""
        for tensor, old in zip(mutable, saved, strict=True):
            tensor.copy_(old)

    def drop() -> None:
        compaction.drop(state, compaction.plan(state, [(x, keep) for x in state.layers]))

    token, one = 2.0 * state.spec.head_dim, f"one layer measured, times {layers}"
    calls = {
        "scores": (lambda: score(state, layer, held), 2 * token * int(valid.sum())),
        "budget": (choose, 2.0 * scores.nbytes),
    }
    found = {
        name: (layers * median_ms([call], bench.device), layers * least, one)
        for name, (call, least) in calls.items()
    }
    took = median_ms([drop], bench.device, before=restore)
    moved = layers * 2 * 2 * token * int(keep.sum())
    return found | {"compaction": (took, moved, "all layers at once, pages not yet given back")}


def cases(bench: Bench) -> list[Case]:
    name = "round, 100K stored, w=256"
    return [Case(group="snapkv", name=name, run=lambda b: snapkv(b, name), seconds=20, rank=32)]
