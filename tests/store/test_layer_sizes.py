"""Caches whose layers differ: in heads, channels, softcap, sinks, chunks, and in whose keys they
read. Each output is compared with plain attention in float64 over what the layer may see.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from kvpolicy import (
    CachePipeline,
    CacheSpec,
    LocalAttention,
    PhaseError,
    Quest,
    SnapKV,
    UnsupportedError,
)
from kvpolicy.calls.score import longest, score, view
from kvpolicy.spec import LayerSizes
from kvpolicy.store import CacheState, load, save
from kvpolicy.store.fork import select_rows

W = 8
LAYERS = (
    LayerSizes(heads=4, kv_heads=2, head_dim=16, value_dim=8, softcap=3.0, scale=0.7),
    LayerSizes(heads=6, kv_heads=3, head_dim=24, window=5, shared=True),
    LayerSizes(heads=4, kv_heads=1, head_dim=16, window=7, chunk=7),
    LayerSizes(heads=4, kv_heads=2, head_dim=16, scale=0.5, shared=True),
)
SINKS = (0, 3)  # layers whose softmax has sinks
LENGTHS = (29, 17)


def spec(**more: object) -> CacheSpec:
    sizes: dict[str, object] = {"page_size": 4, "rollback": 6, "dtype": torch.float64} | more
    first = LAYERS[0]
    return CacheSpec(
        layers=len(LAYERS), heads=first.heads, kv_heads=first.kv_heads, head_dim=first.head_dim,
        per_layer=LAYERS, **sizes,  # type: ignore[arg-type]
    )  # fmt: skip


class Text:
    """Random queries, keys and values of every layer and sequence, and a reader's queries."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return 2 * torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.q = [[normal(x.heads, n, x.head_dim) for n in LENGTHS] for x in LAYERS]
        self.k = [[normal(x.kv_heads, n, x.head_dim) for n in LENGTHS] for x in LAYERS]
        self.v = [[normal(x.kv_heads, n, x.value_dim) for n in LENGTHS] for x in LAYERS]
        self.other = [[normal(2 * x.heads, n, x.head_dim) for n in LENGTHS] for x in LAYERS]
        self.sinks = [normal(x.heads) if n in SINKS else None for n, x in enumerate(LAYERS)]
        self.other_sinks = [
            normal(2 * x.heads) if n in SINKS else None for n, x in enumerate(LAYERS)
        ]

    def wanted(self, layer: int, row: int, at: int, query: Tensor, sinks: Tensor | None,
               local: int | None = None) -> Tensor:  # fmt: skip
        """Plain attention `[Hq, Dv]` of the query `[Hq, D]` at position `at`."""
        sizes = LAYERS[layer]
        seen = torch.arange(at + 1)
        reach = sizes.window or local
        if reach is not None:
            seen = seen[at - seen < reach]
        if sizes.chunk is not None:
            seen = seen[seen // sizes.chunk == at // sizes.chunk]
        group = query.shape[0] // sizes.kv_heads
        keys = self.k[layer][row][:, seen].repeat_interleave(group, 0)
        logits = (keys @ query[..., None]).squeeze(-1) * sizes.scale
        if sizes.softcap is not None:
            logits = sizes.softcap * torch.tanh(logits / sizes.softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None]], 1)
        weights = logits.softmax(-1)[:, : len(seen)]
        values = self.v[layer][row][:, seen].repeat_interleave(group, 0)
        return (weights[..., None] * values).sum(1)


def step(pipeline: CachePipeline, state: CacheState, text: Text, lengths: list[int], phase: str,
         local: int | None = None, alone: tuple[int, ...] | None = None) -> None:  # fmt: skip
    """One call of `lengths` tokens a sequence, each output compared."""
    before = state.lengths
    spans = [(a, a + n) for a, n in zip(before, lengths, strict=True)]
    decode = phase == "decode"
    valid = None
    if decode and max(lengths) > 1:
        valid = torch.ones(len(lengths), max(lengths), dtype=torch.bool)
    pipeline.begin(state, lengths, phase, valid=valid)  # type: ignore[arg-type]
    join = (lambda xs: torch.stack(xs)) if decode else (lambda xs: torch.cat(xs, 1))
    for layer in range(len(LAYERS)):

        def part(source: list[list[Tensor]], layer: int = layer) -> Tensor:
            return join([x[:, a:b] for x, (a, b) in zip(source[layer], spans, strict=True)])

        out = pipeline.attend(
            state, layer, part(text.q), part(text.k), part(text.v), sinks=text.sinks[layer]
        )
        compare(text, layer, spans, out, text.q, text.sinks[layer], decode, local)
        if LAYERS[layer].shared:
            sinks = text.other_sinks[layer]
            out = pipeline.attend_shared(state, layer, part(text.other), sinks=sinks)
            compare(text, layer, spans, out, text.other, sinks, decode, local)
            if not decode or valid is not None:  # the last tokens alone
                tail = [(max(a, b - 2 + decode), b) for a, b in spans]
                query = join([x[:, a:b] for x, (a, b) in zip(text.other[layer], tail, strict=True)])
                last = None if decode else [b - a for a, b in tail]
                out = pipeline.attend_shared(state, layer, query, sinks=sinks, last=last)
                compare(text, layer, tail, out, text.other, sinks, decode, local)
    pipeline.commit(state)


def compare(text: Text, layer: int, spans: list[tuple[int, int]], out: Tensor,
            queries: list[list[Tensor]], sinks: Tensor | None, decode: bool,
            local: int | None) -> None:  # fmt: skip
    if LAYERS[layer].window is not None:
        local = None
    wanted = [
        torch.stack(
            [text.wanted(layer, row, at, queries[layer][row][:, at], sinks, local)
             for at in range(a, b)], 1,
        )
        for row, (a, b) in enumerate(spans)
    ]  # fmt: skip
    found = list(out) if decode else list(out.split([b - a for a, b in spans], 1))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def run(pipeline: CachePipeline, state: CacheState, text: Text, local: int | None = None) -> None:
    step(pipeline, state, text, [15, 3], "prompt", local)
    step(pipeline, state, text, [6, 6], "prompt", local)
    pipeline.end_prompt(state)
    for _ in range(3):
        step(pipeline, state, text, [1, 1], "decode", local)


@pytest.mark.parametrize("local", [None, W])
def test_every_layer_reads_what_it_may_see(local: int | None) -> None:
    admission = {} if local is None else {"admission": LocalAttention(window=W, sinks=0)}
    pipeline = CachePipeline(window=W, **admission)  # type: ignore[arg-type]
    state, text = pipeline.init(spec(), 2), Text()
    run(pipeline, state, text, local)
    step(pipeline, state, text, [4, 4], "decode", local)
    report = pipeline.report(state)
    assert report.sliding_layers == [1, 2] and report.admitted[1] is None
    kept = [len(state.kept(0, 0, head)) for head in range(2)]
    assert kept == [min(28, local or 28)] * 2


def test_kept_counts_the_heads_of_its_layer() -> None:
    pipeline, text = CachePipeline(window=W), Text()
    state = pipeline.init(spec(), 2)
    step(pipeline, state, text, [9, 3], "prompt")
    for layer, sizes in enumerate(LAYERS):
        held = range(max(9 - (sizes.window or 9), 0), 9)
        found = [state.kept(layer, 0, head).tolist() for head in range(sizes.kv_heads)]
        assert found == [[*held]] * sizes.kv_heads
        with pytest.raises(ValueError, match=f"^head: wanted at most {sizes.kv_heads - 1}, got"):
            state.kept(layer, 0, sizes.kv_heads)


@pytest.mark.parametrize(
    ("layer", "without"),
    [(0, {"softcap": None}), (2, {"chunk": None}), (0, {}), (1, {"window": 99})],
)
def test_what_is_left_out_would_show(
    layer: int, without: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text()
    query, sinks = text.q[layer][0][:, 18], text.sinks[layer]
    right = text.wanted(layer, 0, 18, query, sinks)
    changed = list(LAYERS)
    changed[layer] = attrs.evolve(changed[layer], **without)
    monkeypatch.setattr(f"{__name__}.LAYERS", tuple(changed))
    wrong = text.wanted(layer, 0, 18, query, sinks if without else None)
    assert (right - wrong).abs().max() > 1e-3


def test_forks_and_files_hold_every_size(tmp_path: Path) -> None:
    pipeline = CachePipeline(window=W)
    state, text = pipeline.init(spec(), 2), Text()
    run(pipeline, state, text)
    fork = select_rows(state, [0, 1])
    save(state, tmp_path / "cache", pipeline)
    loaded, _, _ = load(tmp_path / "cache", pipeline, spec())
    for cache in (state, fork, loaded):
        step(pipeline, cache, text, [1, 1], "decode")
    assert torch.equal(loaded.layers[0].sinks, text.sinks[0])
    changed = (LAYERS[0], *LAYERS[1:3], LayerSizes(heads=4, kv_heads=2, head_dim=16, scale=0.25))
    with pytest.raises(ValueError, match="per_layer"):
        load(tmp_path / "cache", pipeline, attrs.evolve(spec(), per_layer=changed))


def test_an_eviction_reads_true_weights() -> None:
    """SnapKV scores by weights with softcap and sinks, in its `score` and in the op alike."""
    pipeline = CachePipeline(
        eviction=SnapKV(budget=12, observation=4, kernel=1, normalize="visible"), window=W
    )
    kept = []
    for sinks in (True, False):
        state, text = pipeline.init(spec(), 2), Text(3)
        if not sinks:
            text.sinks = [None] * len(LAYERS)
        pipeline.begin(state, list(LENGTHS), "prompt")
        for layer in range(len(LAYERS)):
            q, k, v = (torch.cat(x[layer], 1) for x in (text.q, text.k, text.v))
            pipeline.attend(state, layer, q, k, v, sinks=text.sinks[layer])
        pipeline.commit(state)
        store = state.layers[0]
        most = longest([store])[0]
        scores, valid = score(state, store, most)
        by_view = store.eviction.score(view(state, store, most))
        torch.testing.assert_close(scores[valid], by_view[valid], rtol=1e-9, atol=1e-12)
        at = LENGTHS[0] - 1
        wanted = weights_of(text, 0, 0, at, 4)
        torch.testing.assert_close(scores[0, :, : wanted.shape[1]], wanted, rtol=1e-9, atol=1e-12)
        kept.append(scores)
    assert (kept[0] - kept[1]).abs().max() > 1e-3


def weights_of(text: Text, layer: int, row: int, at: int, observation: int) -> Tensor:
    """Mean weights `[Hkv, N]` that the last queries give tokens before the window, by hand."""
    sizes, found = LAYERS[layer], []
    group = sizes.heads // sizes.kv_heads
    for position in range(at - observation + 1, at + 1):
        keys = text.k[layer][row][:, : position + 1].repeat_interleave(group, 0)
        logits = (keys @ text.q[layer][row][:, position, :, None]).squeeze(-1) * sizes.scale
        assert sizes.softcap is not None
        logits = sizes.softcap * torch.tanh(logits / sizes.softcap)
        sinks = text.sinks[layer]
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None]], 1)
        found.append(logits.softmax(-1)[:, : at + 1 - W].view(sizes.kv_heads, group, -1))
    return torch.stack(found).mean(0).mean(1)


def test_pages_are_chosen_by_each_query_for_itself() -> None:
    pipeline = CachePipeline(selection=Quest(budget=W + 8), window=W)
    state, text = pipeline.init(spec(), 2), Text()
    step_prompt(pipeline, state, text)
    pipeline.begin(state, [1, 1], "decode")
    for layer in range(len(LAYERS)):
        now = [
            torch.stack([x[:, n] for x, n in zip(of[layer], state.lengths, strict=True)]).unsqueeze(
                2
            )
            for of in (text.q, text.k, text.v, text.other)
        ]
        out = pipeline.attend(state, layer, *now[:3], sinks=text.sinks[layer])
        if layer == 3:
            again = pipeline.attend_shared(state, 3, now[0], sinks=text.sinks[3])
            assert state.layers[3].selected is not None and torch.equal(again, out)
        elif LAYERS[layer].shared:
            pipeline.attend_shared(state, layer, now[3], sinks=text.other_sinks[layer])
    pipeline.commit(state)
    valid = torch.ones(2, 2, dtype=torch.bool)
    pipeline.begin(state, [2, 2], "decode", valid=valid)
    for layer in range(4):
        own = LAYERS[layer]
        shapes = [(own.heads, own.head_dim), (own.kv_heads, own.head_dim)]
        shapes.append((own.kv_heads, own.value_dim))
        now = [torch.zeros(2, heads, 2, dim, dtype=torch.float64) for heads, dim in shapes]
        pipeline.attend(state, layer, *now)
    with pytest.raises(UnsupportedError, match=r"Quest: .* layer 3"):
        pipeline.attend_shared(state, 3, torch.zeros(2, 4, 2, 16, dtype=torch.float64))
    pipeline.abort(state)


def step_prompt(pipeline: CachePipeline, state: CacheState, text: Text) -> None:
    step(pipeline, state, text, [25, 16], "prompt")
    pipeline.end_prompt(state)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="chunk: wanted the window, None, got 4"):
        LayerSizes(heads=2, kv_heads=1, head_dim=8, chunk=4)
    with pytest.raises(ValueError, match="heads: wanted a multiple of kv_heads=2"):
        LayerSizes(heads=3, kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="per_layer: wanted one entry for each of 2 layers, got 4"):
        CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=16, per_layer=LAYERS)
    with pytest.raises(ValueError, match="sliding: wanted"):
        CacheSpec(layers=4, heads=4, kv_heads=2, head_dim=16, per_layer=LAYERS, sliding=[None] * 4)
    pipeline = CachePipeline(window=W)
    state = pipeline.init(spec(), 2)
    with pytest.raises(PhaseError, match="attend_shared: no call"):
        pipeline.attend_shared(state, 1, torch.zeros(6, 2, 24))
    pipeline.begin(state, [1, 1], "prompt")
    query, key = torch.zeros(4, 2, 16, dtype=torch.float64), torch.zeros(2, 2, 16).double()
    with pytest.raises(ValueError, match=r"value: wanted \[2, 2, 8\], got \[2, 2, 16\]"):
        pipeline.attend(state, 0, query, key, key)
    with pytest.raises(ValueError, match=r"sinks: wanted floats \[4\]"):
        pipeline.attend(state, 0, query, key, key[..., :8], sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="layer: wanted one that the spec says is shared"):
        pipeline.attend_shared(state, 0, query)
    with pytest.raises(PhaseError, match="layer 1 has not run"):
        pipeline.attend_shared(state, 1, query)
