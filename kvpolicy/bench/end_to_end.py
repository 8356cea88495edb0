"""Rows of the end-to-end benchmark: TTFT, time per output token, memory, host syncs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from .context import Bench, Case
from .model import CHUNK, PROFILED, Found, build, measure
from .rows import Goal, Row

TTFT = {100_000: 3.5, 200_000: 9.0, 300_000: 17.0, 400_000: 27.0, 500_000: 39.5}  # s
TPOT = {100_000: 6.0, 200_000: 6.9, 300_000: 7.8, 400_000: 8.7, 500_000: 9.6}  # ms


def rows(bench: Bench, kind: str, nominal: int, batch: int, eager: bool) -> Iterator[Row]:
    """TTFT, TPOT, memory and host syncs of one pipeline at one length."""
    tokens = bench.pick(nominal, 96)
    found = measure(bench, kind, tokens, batch, eager)
    bench.shared["found", kind, nominal, batch] = found
    config, other = build(bench).config, "dense" if kind != "dense" else "gate"
    against = bench.shared.get(("found", other, nominal, batch))
    name = f"{kind}, {nominal // 1000}K" + (f", batch {batch}" if batch > 1 else "")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    linear = found.weights / 2 - 2 * config.vocab_size * config.hidden_size
    held = sum(n for layer in found.report.stored for n in layer)  # a sequence, all heads
    kept = held / (layers * config.num_key_value_heads) / tokens
    pairs = batch * layers * heads * tokens**2 / 2 * kept
    flops = 2.0 * linear * tokens * batch + 4.0 * config.head_dim * pairs
    share = f"{100 * kept:.1f} % stored"
    one = batch == 1 and kind == "gate"

    def goal(what: str, table: dict[int, float], got: float) -> tuple[Goal, ...]:
        if not one or nominal not in table:
            return ()
        return (Goal(what=what, wanted=table[nominal], got=got),)

    yield Row(
        group="model", name=f"{name}: TTFT", value=found.ttft, unit="s",
        rate=flops / found.ttft / 1e12, rate_unit="TFLOP/s", floor=bench.floor_ms(flops) / 1e3,
        goals=goal("s", TTFT, found.ttft), shape=f"{batch} x {tokens}, {share}",
        baseline=_ratio(other, against and against.ttft, found.ttft, "s"),
        note=f"chunks of {CHUNK} tokens, first run {found.first_ttft:.2f} s",
    )  # fmt: skip
    tpot = list(goal("ms", TPOT, found.tpot))
    if kind == "gate + Quest" and nominal == 400_000:
        tpot.append(Goal(what="ms", wanted=6.6, got=found.tpot))
    if kind == "gate" and batch > 1:
        tpot.append(Goal(what="ms", wanted=10.2 if batch == 16 else 6.7, got=found.tpot))
    moved = found.weights - 2.0 * config.vocab_size * config.hidden_size  # no embedding table
    read = sum(n for layer in found.report.stored for n in layer) * batch
    if kind == "gate + Quest":
        read = min(read, batch * layers * config.num_key_value_heads * bench.pick(4096, 24))
    floor = bench.floor_ms(moved=moved + 4.0 * config.head_dim * read)
    if kind == "dense" and batch == 16 and against is not None:
        got = found.tpot / against.tpot
        tpot.append(Goal(what="over gate", wanted=2.1, got=got, at_most=False))
    yield Row(
        group="model", name=f"{name}: TPOT", value=found.tpot, floor=floor, goals=tuple(tpot),
        shape=f"{found.steps} steps, {found.decoding}",
        baseline=_ratio(other, against and against.tpot, found.tpot, "ms"),
        note=f"{found.captures} captures"
        + ("" if found.eager is None else f", eager {found.eager:.2f} ms"),
    )  # fmt: skip
    yield _memory(bench, name, found, batch, config)
    if found.counts:
        syncs = found.counts.get("syncs", 0) / PROFILED
        yield Row(
            group="model", name=f"{name}: launches", unit="kernels a step",
            value=found.counts.get("kernels", 0) / PROFILED, extra=found.counts,
            goals=(Goal(what="syncs a step", wanted=0, got=syncs),),
            note=f"{found.counts.get('graphs', 0) / PROFILED:.2f} graph launches a step",
        )  # fmt: skip


def _memory(bench: Bench, name: str, found: Found, batch: int, config: Any) -> Row:
    report = found.report
    ideal = 4.0 * config.head_dim * sum(n for layer in report.stored for n in layer) * batch
    parts = {
        part: getattr(report, part)
        for part in ("kv", "reserved", "positions", "summaries", "tables", "queries", "total")
    }
    goals = [Goal(what="K/V + ring over ideal", wanted=1.01, got=report.kv / ideal)]
    # One chunk's MLP, residual stream and projections, and a layer's gathered rows.
    chunk = 2 * CHUNK * (3 * config.intermediate_size + 6 * config.hidden_size)
    chunk += report.pages // config.num_hidden_layers
    if found.peak:
        share = (found.peak - chunk) / (found.weights + report.kv)
        goals.append(Goal(what="peak over weights + K/V", wanted=1.15, got=share))
    return Row(
        group="model", name=f"{name}: memory", value=report.total / 1e9, unit="GB",
        floor=ideal / 1e9, goals=tuple(goals),
        note=f"allocated {found.resident / 1e9:.2f} GB, peak {found.peak / 1e9:.2f} GB, weights "
        f"{found.weights / 1e9:.2f} GB, one chunk {chunk / 1e9:.2f} GB",
        extra=parts | {"peak": found.peak, "resident": found.resident},
    )  # fmt: skip


def _ratio(other: str, theirs: float | None, own: float, unit: str) -> str:
    return "" if theirs is None else f"{theirs / own:.2f}x {other} {theirs:.4g} {unit}"


def cases(bench: Bench) -> list[Case]:
    # What, tokens, batch, about how many seconds, rank.
    plan = [
        ("gate", 100_000, 1, 50, 10),
        ("dense", 100_000, 1, 40, 33),
        ("gate + Quest", 100_000, 1, 25, 34),
        ("gate", 200_000, 1, 30, 42),
        ("gate", 400_000, 1, 45, 43),
        ("gate + Quest", 400_000, 1, 45, 44),
        ("dense", 200_000, 1, 45, 45),
        ("gate", 32_000, 4, 20, 46),
        ("gate", 32_000, 16, 30, 46),
        ("dense", 32_000, 16, 45, 47),
        ("dense", 400_000, 1, 120, 48),
    ]
    found = []
    for kind, tokens, batch, seconds, rank in bench.pick(plan, [*plan[:3], plan[7]]):
        run = functools.partial(_case, kind, tokens, batch)
        name = f"{kind} {tokens // 1000}K batch {batch}"
        found.append(Case(group="model", name=name, run=run, seconds=seconds, rank=rank))
    return found


def _case(kind: str, tokens: int, batch: int, bench: Bench) -> Iterator[Row]:
    return rows(bench, kind, tokens, batch, eager=tokens == 100_000 and kind != "gate + Quest")
