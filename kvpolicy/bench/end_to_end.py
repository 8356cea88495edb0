"""Rows of the end-to-end benchmark: TTFT, time per output token, memory, host syncs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attrs

from .context import Bench, Case
from .model import FRACTION, LARGE, PROFILED, QUEST, SHAPES, Found, Setting, build, measure
from .rows import Goal, Row

LLAMA, QWEN = SHAPES
TTFT = {  # s
    LLAMA: {100_000: 3.5, 200_000: 9.0, 300_000: 17.0, 400_000: 27.0, 500_000: 39.5},
    QWEN: {100_000: 2.6, 200_000: 7.6, 300_000: 15.0, 400_000: 25.5, 500_000: 38.0},
}
TPOT = {  # ms
    LLAMA: {100_000: 6.0, 200_000: 6.9, 300_000: 7.8, 400_000: 8.7, 500_000: 9.6},
    QWEN: {100_000: 4.4, 200_000: 5.4, 300_000: 6.4, 400_000: 7.4, 500_000: 8.4},
}
BATCHED = {4: 6.7, 16: 10.2}  # ms of a step at 32K
QUEST_400K = 6.6  # ms
OVER_DENSE = 2.1  # batch 16 at 32K

GATE = functools.partial(Setting, policy="gate")
QUESTED = functools.partial(Setting, policy="gate + Quest")
DENSE = functools.partial(Setting, policy="dense")
# The important ones first; the first of all runs among the kernels.
FIRST, FIRST_RANK, RANK = GATE(tokens=100_000), 10, 42
PLAN = (
    DENSE(tokens=100_000),
    GATE(tokens=400_000),
    QUESTED(tokens=400_000),
    GATE(tokens=200_000),
    GATE(tokens=32_000, batch=16),
    DENSE(tokens=32_000, batch=16),
    GATE(tokens=32_000, batch=4),
    GATE(tokens=100_000, shape=QWEN),
    GATE(tokens=200_000, shape=QWEN),
    GATE(tokens=300_000),
    GATE(tokens=500_000),
    DENSE(tokens=200_000),
    QUESTED(tokens=100_000),
    Setting(policy="gate + SnapKV", tokens=100_000),
    GATE(tokens=400_000, shape=QWEN),
    GATE(tokens=100_000, fraction=0.2),  # about what the reference's figures are for
    GATE(tokens=100_000, fraction=0.1),
    GATE(tokens=100_000, fraction=0.5),
    GATE(tokens=32_000),
    DENSE(tokens=32_000),
    DENSE(tokens=32_000, batch=4),
    GATE(tokens=300_000, shape=QWEN),
    GATE(tokens=500_000, shape=QWEN),
    DENSE(tokens=100_000, shape=QWEN),
    *(GATE(tokens=n, fraction=0.2) for n in (200_000, 300_000, 400_000, 500_000)),
    DENSE(tokens=400_000),
    GATE(tokens=1_000_000),
)
# Of several GPUs that share the heads.
SHARED = (
    GATE(tokens=100_000),
    DENSE(tokens=100_000),
    GATE(tokens=400_000),
    QUESTED(tokens=400_000),
    GATE(tokens=1_000_000),
    GATE(tokens=100_000, shape=LARGE),
    DENSE(tokens=100_000, shape=LARGE),
)


def rows(bench: Bench, setting: Setting) -> Iterator[Row]:
    """TTFT, TPOT, memory and host syncs of one setting."""
    found = measure(bench, setting)
    bench.shared["found", setting] = found
    config = build(bench, setting.shape).config
    tokens, batch = bench.pick(setting.tokens, 96), setting.batch
    held = sum(n for layer in found.report.stored for n in layer) * batch  # over all heads
    heads = config.num_hidden_layers * config.num_key_value_heads * batch
    dense = setting.policy == "dense"
    table = 2.0 * config.vocab_size * config.hidden_size  # bytes
    read = found.weights - (0 if config.tie_word_embeddings else table)  # embeddings are looked up
    kept = held / heads / tokens
    if setting.policy == "gate + SnapKV":  # the prompt saw what it evicted later
        kept = setting.fraction
    pairs = heads / config.num_key_value_heads * config.num_attention_heads * tokens**2 / 2 * kept
    flops = (read - table) * tokens * batch + 4.0 * config.head_dim * pairs
    other, against = _other(bench, setting)
    about = attrs.asdict(setting) | {"stored": held}

    def goals(table: dict[str, dict[int, float]], what: str, got: float) -> list[Goal]:
        wanted = table.get(setting.shape, {}).get(setting.tokens)
        plain = setting == GATE(tokens=setting.tokens, shape=setting.shape)
        return [Goal(what=what, wanted=wanted, got=got)] if plain and wanted else []

    yield Row(
        group="model", name=f"{setting}: TTFT", value=found.ttft, unit="s",
        rate=flops / found.ttft / 1e12, rate_unit="TFLOP/s",
        floor=bench.floor_ms(flops / bench.ranks) / 1e3,
        goals=tuple(goals(TTFT, "s", found.ttft)),
        shape=f"{batch} x {tokens}, {100 * kept:.1f} % stored",
        baseline=_ratio(other, against.ttft if against else None, found.ttft, "s"),
        note=f"chunks of {found.chunk} tokens, first run {found.first_ttft:.2f} s",
        extra=about | {"what": "TTFT"},
    )  # fmt: skip
    wanted = goals(TPOT, "ms", found.tpot)
    if setting == QUESTED(tokens=400_000):
        wanted.append(Goal(what="ms", wanted=QUEST_400K, got=found.tpot))
    if setting.policy == "gate" and batch in BATCHED:
        wanted.append(Goal(what="ms", wanted=BATCHED[batch], got=found.tpot))
    if dense and batch == 16 and against is not None:
        over = found.tpot / against.tpot
        wanted.append(Goal(what="over gate", wanted=OVER_DENSE, got=over, at_most=False))
    seen = held
    if setting.policy == "gate + Quest":
        seen = min(held, heads * bench.pick(QUEST, 24))
    yield Row(
        group="model", name=f"{setting}: TPOT", value=found.tpot, goals=tuple(wanted),
        floor=bench.floor_ms(moved=(read + 4.0 * config.head_dim * seen) / bench.ranks),
        shape=f"{found.steps} steps, {found.decoding}",
        baseline=_ratio(other, against.tpot if against else None, found.tpot, "ms"),
        note=f"{found.captures} captures"
        + ("" if found.eager is None else f", eager {found.eager:.2f} ms"),
        extra=about | {"what": "TPOT"},
    )  # fmt: skip
    yield _memory(setting, found, held, config)
    if found.counts:
        syncs = found.counts.get("syncs", 0) / PROFILED
        yield Row(
            group="model", name=f"{setting}: launches", unit="kernels a step",
            value=found.counts.get("kernels", 0) / PROFILED, extra=found.counts,
            goals=(Goal(what="syncs a step", wanted=0, got=syncs),),
            note=f"{found.counts.get('graphs', 0) / PROFILED:.2f} graph launches a step",
        )  # fmt: skip


def _other(bench: Bench, setting: Setting) -> tuple[str, Found | None]:
    """What a setting is compared with: dense, or for dense the gate, of the same run."""
    name = "gate" if setting.policy == "dense" else "dense"
    other = attrs.evolve(setting, policy=name, fraction=FRACTION)
    return name, bench.shared.get(("found", other))


def _memory(setting: Setting, found: Found, held: int, config: Any) -> Row:
    report = found.report
    ideal = 4.0 * config.head_dim * held
    parts = {
        part: getattr(report, part)
        for part in ("kv", "reserved", "positions", "summaries", "tables", "queries", "total")
    }
    by_rank = [sum(n for layer in rank.stored for n in layer) for rank in report.ranks]
    goals = [Goal(what="K/V + ring over ideal", wanted=1.01, got=report.kv / ideal)]
    # One chunk's MLP, residual stream and projections, and a layer's gathered rows.
    ranks = setting.ranks  # a rank's part, but for its whole residual stream
    chunk = 2 * found.chunk * (3 * config.intermediate_size // ranks + 6 * config.hidden_size)
    chunk += report.pages // config.num_hidden_layers // ranks
    if found.peak:
        share = (found.peak - chunk) / ((found.weights + report.kv) / ranks)
        goals.append(Goal(what="peak over weights + K/V", wanted=1.15, got=share))
    return Row(
        group="model", name=f"{setting}: memory", value=report.total / 1e9, unit="GB",
        floor=ideal / 1e9, goals=tuple(goals),
        note=f"allocated {found.resident / 1e9:.2f} GB, peak {found.peak / 1e9:.2f} GB, weights "
        f"{found.weights / 1e9:.2f} GB, one chunk {chunk / 1e9:.2f} GB",
        extra=parts | {"peak": found.peak, "resident": found.resident, "stored by rank": by_rank},
    )  # fmt: skip


def _ratio(other: str, theirs: float | None, own: float, unit: str) -> str:
    return "" if theirs is None else f"{theirs / own:.2f}x {other} {theirs:.4g} {unit}"


def seconds(setting: Setting) -> float:
    """About what a setting takes, from what prompts took on an H200, with some to spare."""
    hundreds, llama = setting.tokens / 1e5, setting.shape != QWEN
    attention = 5.0 if setting.policy == "dense" else 0.3 + 5.0 * setting.fraction
    linear = 2.7 if llama else 1.5
    each = setting.batch / setting.ranks
    prompt = each * hundreds * (linear + attention * hundreds * (1.0 if llama else 1.125))
    return 15 + 1.15 * prompt


def cases(bench: Bench) -> list[Case]:
    few: tuple[Setting, ...] = (
        DENSE(tokens=100_000),
        QUESTED(tokens=400_000),
        GATE(tokens=32_000, batch=4),
    )
    tried = (*few, GATE(tokens=100_000, shape=QWEN), PLAN[13])
    found = []
    if bench.ranks > 1:
        few = bench.pick(SHARED, (SHARED[0], SHARED[3], SHARED[5]))
        plan = [attrs.evolve(x, ranks=bench.ranks) for x in few]
        return [
            Case(
                group="model", name=str(x), run=functools.partial(_case, x), rank=place,
                seconds=seconds(x) + 60,
            )
            for place, x in enumerate(plan)
        ]  # fmt: skip
    for place, setting in enumerate((FIRST, *bench.pick(PLAN, tried))):
        rank = FIRST_RANK if setting == FIRST else 33 if place == 1 else RANK + place
        new = setting == FIRST or setting == GATE(tokens=100_000, shape=QWEN)
        found.append(
            Case(
                group="model", name=str(setting), run=functools.partial(_case, setting), rank=rank,
                seconds=seconds(setting) + (45 if new else 0),  # to build and to compile a model
            )
        )  # fmt: skip
    return found


def _case(setting: Setting, bench: Bench) -> Iterator[Row]:
    return rows(bench, setting)
