"""What a prompt call adds to attention: gate, indices and page writes of one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import reference
from ..admission import Write
from ..calls.prompt import segments_of, write_prompt
from ..ops import ADMITTED
from ..pipeline import CachePipeline
from ..spec import CacheSpec
from .context import Bench, Case, check
from .gates import random_gate
from .rows import CheckFailed, Goal, Row
from .timing import median_ms

FRACTION = 0.25


def write(bench: Bench, case: str) -> Iterator[Row]:
    """Gate, indices and pages at 131K for one layer, together and apart."""
    tokens, kv_heads = bench.pick(131072, 192), bench.pick(8, 2)
    dim, width, window = bench.pick(128, 32), bench.pick(512, 32), bench.pick(256, 16)
    pipeline = CachePipeline(
        admission=random_gate(1, kv_heads, width, dim, window, bench.device), backend="triton"
    )
    spec = CacheSpec(
        layers=1, heads=4 * kv_heads, kv_heads=kv_heads, head_dim=dim, dtype=bench.dtype,
        device=bench.device,
    )  # fmt: skip
    state = pipeline.init(spec)
    pipeline.begin(state, [tokens], "prompt")
    layer, call = state.layers[0], state.call
    assert call is not None
    segments = segments_of(state, call, layer)
    key, value, pre = (bench.randn(tokens, kv_heads, dim).transpose(0, 1) for _ in range(3))
    admitted = torch.rand(kv_heads, tokens, device=bench.device) < FRACTION
    flags = admitted.to(torch.uint8) * ADMITTED
    new = Write(
        key, value, torch.arange(tokens, device=bench.device), segments.cu_q_dev, 0,
        range(kv_heads), key_pre=pre,
    )  # fmt: skip
    gate = layer.admission

    def empty() -> None:
        layer.pool.release(layer.table.flatten())
        layer.table.zero_()
        layer.counts.zero_()

    def store() -> None:
        write_prompt(state, call, layer, segments, key, value, flags)

    def both() -> None:
        gate.admit(new)
        store()

    rows = torch.randint(tokens, (64,), device=bench.device)
    weights = [getattr(gate, name)[0] for name in ("norm_pre", "norm_post", "w1", "b1", "w2", "b2")]
    exact = [x.double() for x in (pre[:, rows], key[:, rows], *weights)]
    check(case, gate.scores(new)[:, rows], reference.write_gate(*exact))  # type: ignore[attr-defined]
    store()
    state.sequences[0].length = tokens
    for head in (0, kv_heads - 1):
        want = admitted[head].nonzero().squeeze(1)
        got = state.kept(0, 0, head)
        if not torch.equal(got[:-window], want[want < tokens - window]):
            raise CheckFailed(f"{case}: head {head} stored other positions; not timed")
    state.sequences[0].length = 0
    took = {
        name: median_ms([call], bench.device, before=empty)
        for name, call in {"both": both, "gate": lambda: gate.admit(new), "store": store}.items()
    }
    flops = 2.0 * (2 * dim + 1) * width * kv_heads * tokens
    copied = 2 * 4.0 * dim * int(admitted.sum())  # keys and values, read and written
    floor = bench.floor_ms(flops, 4.0 * dim * kv_heads * tokens) + bench.floor_ms(moved=copied)
    yield Row(
        group="write", name=case, value=took["both"], rate=flops / took["gate"] / 1e9,
        rate_unit="TFLOP/s", floor=floor, goals=(Goal(what="ms", wanted=1.5, got=took["both"]),),
        shape=f"{tokens} tokens, {kv_heads} KV heads, D={dim}, m={width}, 25 % admitted",
        note=f"gate {took['gate']:.4g} ms, indices and pages {took['store']:.4g} ms",
        extra=took,
    )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    name = "gate, indices, pages 131K"
    return [Case(group="write", name=name, run=lambda b: write(b, name), rank=31)]
