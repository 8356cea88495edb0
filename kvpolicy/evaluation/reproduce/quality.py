"""Figures 7, 9 and 10: what is answered from how much of the cache."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from ...budget import TotalCap
from ...eviction import SnapKV
from ...pipeline import CachePipeline
from ...selection import Quest
from ..benchmarks.benchmark import Benchmark, Wanted
from ..benchmarks.helmet import Helmet
from ..benchmarks.item import Item
from ..benchmarks.published import PUBLISHED
from ..benchmarks.runner import BenchmarkRunner
from ..chart import Chart, Point
from ..grid.records import Measured, Result
from ..grid.results import Store
from ..grid.variants import FULL, Build, Variant, matched
from ..sessions.estimates import estimate
from . import published
from .setup import Setup

_PROBLEM = 4096  # tokens that a problem may have
HELMET_NOTES = (
    "Other than there: HELMET's parts that a model judges are left out, prompts are in wordings of "
    "our own without demonstrations (no chat template, as there), answers end at a token that ends "
    "a reply and at no newline.",
)


def accuracy(setup: Setup) -> tuple[list[Chart], int]:
    """Figure 7, and how many of its cells are left or failed."""
    sizes = setup.sizes
    found = [_full(sizes.window)]
    found += [_own(f"lambda {x:g}", "write gate", partial(_gated, setup, x)) for x in sizes.lambdas]
    baselines = matched(setup.duo, sizes.window)
    for family in ("DuoAttention", "local"):
        if family in baselines:
            found += [
                Variant(name=f"{family} {part:g}", family=family, build=baselines[family],
                        keep=part)
                for part in sizes.parts
            ]  # fmt: skip
    results, left = _measured(_plain(setup), Helmet(), found, sizes.tokens)
    points = _relative(results, lambda x, full: x.held_after / full.held_after)
    chart = Chart(
        title="WG-KV, figure 7: HELMET",
        x="cache held after answers, of full attention's",
        y="mean of score / full",
        points=[*points, *published.accuracy()],
        notes=(*HELMET_NOTES, "Published: 14 tasks, six of which are not in ours."),
    )
    return [chart], left


def selection(setup: Setup) -> tuple[list[Chart], int]:
    """Figure 9, and how many of its cells are left or failed."""
    sizes = setup.sizes
    found = [_full(sizes.window)]
    for budget in sizes.budgets:
        quest = partial(_quest, setup, budget)
        found += [_own(f"Quest {budget}", "Quest", partial(quest, None))]
        gated = partial(quest, published.QUEST_LAMBDA)
        found += [_own(f"gate + Quest {budget}", "gate + Quest", gated)]
    results, left = _measured(_plain(setup), Helmet(), found, sizes.tokens)
    points = _relative(results, lambda x, full: x.footprint.read_tokens)
    chart = Chart(
        title=f"WG-KV, figure 9: HELMET with Quest, lambda {published.QUEST_LAMBDA:g}",
        x="tokens that a decoded token reads",
        y="mean of score / full",
        points=[x for x in points if x.curve != FULL] + published.selection(),
        notes=HELMET_NOTES,
        log_x=True,
    )
    return [chart], left


def reasoning(setup: Setup) -> tuple[list[Chart], int]:
    """Figure 10, and how many of its cells are left or failed."""
    sizes, found = setup.sizes, [_full(setup.sizes.window)]
    found += [_own(f"SnapKV {sizes.cap}", "SnapKV", partial(_capped, setup, None))]
    for lam in sizes.reason_lambdas:
        found.append(_own(f"lambda {lam:g}", "write gate", partial(_gated, setup, lam)))
        capped = partial(_capped, setup, lam)
        found.append(_own(f"lambda {lam:g} + SnapKV", "gate + SnapKV", capped))
    task = Longer(PUBLISHED["aime25"], sizes.new_tokens)
    results, left = _measured(
        setup, task, found, sizes.new_tokens + _PROBLEM, drawn=dict(published.SAMPLING)
    )
    points = []
    for result in results:
        done = result.measured
        if done is not None:
            score = estimate(done.scores["score"])
            held = done.held_after or float("nan")
            points.append(
                Point(curve=result.family, name=result.variant, x=held, y=score.mean,
                      error=score.standard_error)
            )  # fmt: skip
    chart = Chart(
        title="WG-KV, figure 10: AIME25",
        x="tokens that a head holds after answers",
        y="answers that are right",
        points=[*points, *published.reasoning()],
        notes=("One drawn sample a problem, as there: with 30 problems two more or fewer are "
               "noise.",),
    )  # fmt: skip
    return [chart], left


@attrs.frozen
class Longer(Benchmark):
    """Another benchmark whose answers may have so many tokens."""

    of: Benchmark
    new_tokens: int

    def tasks(self, data: Sequence[Path] = ()) -> tuple[str, ...]:
        return self.of.tasks(data)

    def items(self, task: str, wanted: Wanted) -> list[Item]:
        found = self.of.items(task, wanted)
        return [attrs.evolve(item, new_tokens=self.new_tokens) for item in found]

    def score(self, answer: str, item: Item) -> float:
        return self.of.score(answer, item)


def _full(window: int) -> Variant:
    return _own(FULL, FULL, lambda: CachePipeline(window=window))


def _own(name: str, family: str, make: Callable[[], CachePipeline]) -> Variant:
    build: Build = lambda room: make()  # noqa: E731
    return Variant(name=name, family=family, build=build, prompt_only=False)


def _gated(setup: Setup, lam: float) -> CachePipeline:
    return CachePipeline(admission=setup.gate(lam))


def _quest(setup: Setup, budget: int, lam: float | None) -> CachePipeline:
    reads = Quest(budget=budget, last="partial")
    if lam is None:
        return CachePipeline(selection=reads, window=setup.sizes.window)
    return CachePipeline(admission=setup.gate(lam), selection=reads)


def _capped(setup: Setup, lam: float | None) -> CachePipeline:
    """SnapKV while decoding under a cap of all heads together, as the authors set it."""
    config, sizes = setup.model.config, setup.sizes
    heads = config.num_hidden_layers * config.num_key_value_heads
    eviction = SnapKV(
        budget=TotalCap((sizes.cap - sizes.window) * heads, published.DROP),
        when="decode",
        observation=sizes.window,
        group="max",
        normalize="global",
        pooling="max",
    )
    if lam is None:
        return CachePipeline(eviction=eviction, window=sizes.window)
    return CachePipeline(admission=setup.gate(lam), eviction=eviction)


def _plain(setup: Setup) -> Setup:
    """Without a chat template, as HELMET was asked."""
    tokenizer = copy.copy(setup.tokenizer)
    tokenizer.chat_template = None
    return attrs.evolve(setup, tokenizer=tokenizer)


def _measured(
    setup: Setup,
    benchmark: Benchmark,
    found: Sequence[Variant],
    length: int,
    drawn: Mapping[str, Any] | None = None,
) -> tuple[list[Result], int]:
    """Results of all cells that there are, and how many are left or failed."""
    store = Store(setup.out / "cells")
    runner = BenchmarkRunner(
        model=setup.model,
        tokenizer=setup.tokenizer,
        benchmark=benchmark,
        text="",
        contexts=setup.sizes.contexts,
        seed=42,
        deadline=setup.deadline,
        store=store,
        results=store.open(setup.settings, setup.made_with),
        data=setup.data,
        drawn=drawn or {},
        say=setup.say,
    )
    runner.run(benchmark.chosen(None, setup.data), [length], found)
    return runner.results, runner.left + len(runner.failed)


def _relative(results: Sequence[Result], size: Callable[[Any, Any], float]) -> list[Point]:
    """Means over tasks of scores as parts of full attention's, as the authors make them.

    Only compositions that were measured on every task on which full attention scores anything.
    """
    full = {x.task: x.measured for x in results if x.variant == FULL}
    counted: dict[str, Measured] = {t: x for t, x in full.items() if x is not None and _score(x)}
    points = []
    for name in dict.fromkeys(x.variant for x in results):
        rows = [x for x in results if x.variant == name and x.task in counted]
        done = [(x.measured, counted[x.task]) for x in rows if x.measured is not None]
        if done and len(done) == len(counted):
            parts = [_score(x) / _score(of) for x, of in done]
            points.append(
                Point(
                    curve=rows[0].family,
                    name=name,
                    x=statistics.fmean(size(x, of) for x, of in done),
                    y=statistics.fmean(parts),
                    more={"tasks": len(done)},
                )
            )
    return points


def _score(measured: Measured) -> float:
    return statistics.fmean(measured.scores["score"])
