"""Attention of a decoded token over ragged pages, all of them or those that Quest picks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..store.pool import PagePool
from .context import Bench, Case
from .data import tokens_of
from .flashinfer import flashinfer_ms
from .layer import Layer
from .rows import CheckFailed, Goal, Row
from .timing import captured_ms

TARGETS = {8_000: 16e-3, 25_000: 34e-3, 100_000: 111e-3, 400_000: 430e-3}  # ms
QUEST_BUDGET = 4096


def ragged_decode(bench: Bench, case: str, mean: int, page: int) -> Iterator[Row]:
    """Ragged paged decode inside a graph."""
    layer = Layer(bench, bench.pick(mean, 40 + mean // 10_000), page)
    for index in range(min(2, len(layer.tables))):
        layer.check(case, index)
    calls = _calls(layer.attend, len(layer.tables))
    ms = captured_ms(calls, bench.device)
    bench.shared["decode", mean, page] = ms
    goals = [Goal(what="us", wanted=1e3 * TARGETS[mean], got=1e3 * ms)]
    other = bench.shared.get(("decode", mean, 64))
    if page == 16 and other is not None:
        goals.append(Goal(what="of page 64", wanted=1.05, got=ms / other))
    baselines = [] if other is None or page == 64 else [f"{ms / other:.3f}x page 64"]
    # FlashInfer has no kernels for the head size of a quick run.
    theirs = None if bench.quick else flashinfer_ms(bench, case, layer)
    if theirs is not None:
        baselines.append(f"{theirs / ms:.2f}x FlashInfer {1e3 * theirs:.4g} us")
    yield Row(
        group="decode", name=case, value=1e3 * ms, unit="us", rate=layer.bytes / ms / 1e9,
        rate_unit="TB/s", floor=1e3 * bench.floor_ms(moved=layer.bytes), goals=tuple(goals),
        shape=f"{layer.heads}/{layer.kv_heads} heads of {layer.lengths[0]}-{layer.lengths[-1]}",
        baseline=", ".join(baselines),
        note=f"captured, {len(calls)} buffer sets",
    )  # fmt: skip


def quest(bench: Bench, case: str) -> Iterator[Row]:
    """Quest: page scores, the best pages and attention over them, in one graph."""
    mean, page = bench.pick(100_000, 320), 16
    budget = bench.pick(QUEST_BUDGET, 80)
    layer = Layer(bench, mean, page, quest=budget)
    count = -(-(budget - layer.window) // page)
    for index in range(min(2, len(layer.tables))):
        selected = layer.choose(index, count)
        _check_choice(layer, index, selected)
        layer.check(case, index, selected)
    sets = len(layer.tables)
    choose = captured_ms(_calls(lambda i: layer.choose(i, count), sets), bench.device)
    both = captured_ms(
        _calls(lambda i: layer.attend(i, layer.choose(i, count)), sets), bench.device
    )
    full = captured_ms(_calls(layer.attend, sets), bench.device)
    yield Row(
        group="quest", name=case, value=1e3 * both, unit="us", rate=layer.bytes / both / 1e9,
        rate_unit="TB/s", floor=1e3 * bench.floor_ms(moved=layer.bytes),
        goals=(
            Goal(what="us", wanted=32, got=1e3 * both),
            Goal(what="of full decode", wanted=1 / 3, got=both / full),
        ),
        shape=f"{layer.kv_heads} heads of {layer.lengths[0]}-{layer.lengths[-1]}, budget {budget}",
        baseline=f"{full / both:.2f}x full decode {1e3 * full:.4g} us",
        note=f"scores and top-k {1e3 * choose:.4g} us, captured, {sets} buffer sets",
    )  # fmt: skip


def _check_choice(layer: Layer, index: int, selected: Tensor) -> None:
    """No page left out may score more than one taken, rounding apart."""
    table, group = layer.tables[index].table, layer.heads // layer.kv_heads
    for head in (0, layer.kv_heads - 1):
        used = -(-layer.lengths[head] // layer.pool.page_size)
        summary = _summaries(layer.pool, table[0, head, :used])
        low, high = summary.double().chunk(2, -1)
        q = layer.queries[index][0, head * group : (head + 1) * group, None].double()
        scores = torch.maximum(q * low, q * high).sum(-1).amax(0)
        chosen = selected[0, head].long()
        taken = torch.zeros_like(scores, dtype=torch.bool)
        taken[chosen[chosen >= 0]] = True
        wanted = min(selected.shape[2], used)
        sure = scores.clone()
        sure[-1] = float("inf")
        slack = 1e-2 * float(scores.abs().max())
        wrong = int(taken.sum()) != wanted or not bool(taken[-1])
        if wanted < used:
            wrong = wrong or float(sure[taken].min()) < float(sure[~taken].max()) - slack
        if wrong:
            raise CheckFailed(f"quest head {head}: not the best pages; not timed")


def _summaries(pool: PagePool, ids: Tensor) -> Tensor:
    found = tokens_of(pool, ids, ids.numel() * pool.page_size)[2]
    assert found is not None
    return found


def _calls(call: Callable[[int], Any], sets: int) -> list[Callable[[], Any]]:
    return [functools.partial(call, index) for index in range(sets)]


def cases(bench: Bench) -> list[Case]:
    found = []
    for mean in (100_000, 400_000, 25_000, 8_000):
        for page in (64, 16):
            name = f"{mean // 1000}K page {page}"
            run = functools.partial(_ragged_case, name, mean, page)
            rank = 1 if mean == 100_000 else 40
            found.append(Case(group="decode", name=name, run=run, seconds=6, rank=rank))
    name = "100K budget 4096"
    found.append(Case(group="quest", name=name, run=lambda b: quest(b, name), seconds=8, rank=30))
    return found


def _ragged_case(name: str, mean: int, page: int, bench: Bench) -> Iterator[Row]:
    return ragged_decode(bench, name, mean, page)
