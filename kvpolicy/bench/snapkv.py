"""One scoring round of SnapKV over a full layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..budget import Tokens
from ..eviction import SnapKV
from ..pipeline import CachePipeline
from ..spec import CacheSpec
from ..store import CacheState, compaction
from ..types import EvictionView
from .context import Bench, Case, check
from .rows import Goal, Row
from .timing import median_ms

LAYERS = 32


def full_state(
    bench: Bench, pipeline: CachePipeline, heads: int, kv_heads: int, held: int
) -> CacheState:
    """One layer whose heads store `held` random tokens each, at positions 0, 1, ..."""
    dim = bench.pick(128, 32)
    spec = CacheSpec(
        layers=1, heads=heads, kv_heads=kv_heads, head_dim=dim, dtype=bench.dtype,
        device=bench.device,
    )  # fmt: skip
    state = pipeline.init(spec)
    layer, size = state.layers[0], spec.page_size
    state.lengths = [held + layer.window]
    state.reserve(held)
    state.sync_devices()
    pages = -(-held // size)
    ids = layer.pool.take(kv_heads * pages).view(kv_heads, pages)
    layer.table[0, :, :pages] = ids
    layer.counts.fill_(held)
    first = torch.zeros(layer.pool.capacity, dtype=torch.int32, device=bench.device)
    first[ids.long()] = torch.arange(pages, dtype=torch.int32, device=bench.device) * size
    base, slot = 0, torch.arange(size, dtype=torch.int32, device=bench.device)
    for k, v, meta, _ in layer.pool.extents:
        k.normal_()
        v.normal_()
        meta.copy_(first[base : base + meta.shape[0], None] + slot)
        base += meta.shape[0]
    assert layer.queries is not None
    for tensor in (layer.ring_k, layer.ring_v, layer.queries):
        tensor.normal_()
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
    logits = view.queries[0, :group].double() @ keys.T * view.scale
    seen = (where <= at[:, None]) & there
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)[..., : view.keys.shape[2]]
    mass = weights.mean((0, 1)).masked_fill(~view.valid[0, 0], 0)
    return F.avg_pool1d(mass[None], policy.kernel, 1, policy.kernel // 2)[0]


def snapkv(bench: Bench, case: str) -> Iterator[Row]:
    """View and scores of one layer, times the model's layers; peak scratch beside the cache."""
    heads, kv_heads = bench.pick(32, 4), bench.pick(8, 2)
    held, window = bench.pick(100_000, 300), bench.pick(256, 16)
    policy = SnapKV(budget=Tokens(bench.pick(32768, 64)), observation=window)
    pipeline = CachePipeline(eviction=policy, window=window, backend="triton")
    state = full_state(bench, pipeline, heads, kv_heads, held)
    layer, dim = state.layers[0], state.spec.head_dim

    def round_() -> torch.Tensor:
        return layer.eviction.score(compaction.view(state, layer))

    view = compaction.view(state, layer)
    check(case, layer.eviction.score(view)[0, 0], exact_scores(policy, view))
    del view
    scratch = 0
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        round_()
        scratch = torch.cuda.max_memory_allocated() - before
    ms = LAYERS * median_ms([round_], bench.device)
    # q.k twice: once for the softmax' sums, once for the weights.
    flops = LAYERS * 2 * 2.0 * dim * heads * window * held
    moved = LAYERS * 2.0 * dim * kv_heads * held
    yield Row(
        group="snapkv", name=case, value=ms, rate=flops / ms / 1e9, rate_unit="TFLOP/s",
        floor=bench.floor_ms(flops, moved), shape=f"{held} stored a head, w={window}, x{LAYERS}",
        goals=(
            Goal(what="ms", wanted=60, got=ms),
            Goal(what="scratch MB", wanted=256, got=scratch / 1e6),
        ),
        note="one layer measured; view and scores", extra={"scratch_bytes": scratch},
    )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    name = "round, 100K stored, w=256"
    return [Case(group="snapkv", name=name, run=lambda b: snapkv(b, name), rank=32)]
