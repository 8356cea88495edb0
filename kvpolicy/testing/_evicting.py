"""Checking an eviction in a pipeline: what stays of a cache, and what memory it takes."""

from __future__ import annotations

import torch

from ..budget import Budget, BudgetView, Counts, bound_layers
from ..calls.budgets import budget_view
from ..calls.score import longest, score, view
from ..eviction import Eviction
from ..pipeline import CachePipeline
from ..spec import CacheSpec
from ..store import CacheState
from ..store.layer import LayerStore
from ._cache import decode, end_prompt, kept, prompt, random_data
from ._common import ConformanceError, check_equal, require, run
from ._views import GARBAGE


def check_in_pipeline(
    policy: Eviction,
    spec: CacheSpec,
    window: int,
    tokens: int | None,
    hidden: int,
    effect: bool,
    seed: int,
) -> None:
    """Checks what an eviction does to a cache: `cut` to `takes effect` of `check_eviction`.

    Of prompts of `tokens`, by default a few pages more than the budget or `window`.
    """
    pipeline = CachePipeline(eviction=policy, window=window, backend="reference")
    size = spec.page_size
    if tokens is None:
        tokens = window + _room(policy, spec, window) + 3 * size - 5
    steps = 2 * spec.interval if policy.when == "decode" else 2
    data = random_data(spec, [tokens, max(tokens - size, 1)], steps, hidden, seed)
    state, seen = prompt(pipeline, data, tokens), min(data.lengths)
    before = pipeline.report(state)
    _fused(state)
    asked = _asked(pipeline, state)
    end_prompt(pipeline, state, data, seen)
    _counted_once(state)
    found, wanted = pipeline.report(state), kept(state, range(2))

    for chunk in (max(tokens // 3, 1), 7):
        other = prompt(pipeline, data, chunk)
        end_prompt(pipeline, other, data, seen)
        case = f"the tokens kept as in one call, the prompt in calls of {chunk}"
        _same_kept(policy, "cut", kept(other, range(2)), wanted, case)
    for row in range(2):
        other = prompt(pipeline, data.row(row), tokens)
        end_prompt(pipeline, other, data.row(row), seen)
        case = f"the tokens kept as in the batch, for sequence {row} alone"
        _same_kept(policy, "batch", kept(other, [0]), kept(state, [row]), case)
    for positions, n in zip(wanted, _lengths(spec, data.lengths), strict=True):
        recent = list(range(max(n - window, 0), n))
        holds = positions[-len(recent) :] == recent
        require(holds, "window", policy, "the local window kept", f"positions {positions[-5:]}")

    evicted = sum(map(sum, found.evicted))
    if policy.neutral:
        require(not evicted, "neutral", policy, "nothing evicted", f"{evicted} tokens evicted")
    if effect:
        case = "tokens evicted (else say takes_effect=False)"
        require(evicted > 0, "takes effect", policy, case, f"none of {tokens} tokens per head")
    heads = 2 * spec.kv_heads * spec.layers
    if evicted >= heads * size:
        text, holds = f"fewer bytes of pages than {before.pages}", found.pages < before.pages
        require(holds, "frees pages", policy, text, f"{found.pages}, {evicted} tokens having gone")
    _budget(pipeline, state, asked)
    decode(pipeline, state, data)
    if policy.when == "decode":
        # What a budget over layers asks for depends on what is stored when it is asked.
        asked = [x for x in _asked(pipeline, state) if not x[0].spans_layers]
        _budget(pipeline, state, asked, spec.interval)


def _fused(state: CacheState) -> None:
    """`scores`, which may read the pages by an op, gives what `score` says of a view of them.

    Whatever lies in slots of pages that hold no token.
    """
    for layer in state.managed:
        _spoil(layer)
    for layer, most in zip(state.layers, longest(state.layers), strict=True):
        policy = layer.eviction
        if policy.neutral or not most:
            continue
        got, valid = run(policy, score, state, layer, most)
        wanted = policy.score(view(state, layer, most)).masked_fill(~valid, 0.0)
        got = got.masked_fill(~valid, 0.0)
        check_equal("fused", policy, got.to(wanted.dtype), wanted, "from scores, as from score")


def _spoil(layer: LayerStore) -> None:
    """Garbage in the slots of a layer's pages that hold no token."""
    size, pages = layer.pool.page_size, layer.pool.pages
    for ids, counts in zip(layer.table.tolist(), layer.counts.tolist(), strict=True):
        for own, count in zip(ids, counts, strict=True):
            if count % size:
                for store in (pages.k, pages.v):
                    store[own[count // size], count % size :] = GARBAGE


def _counted_once(state: CacheState) -> None:
    """Scores that are sums and become numbers grow by nothing but queries, of which none came."""
    for layer, most in zip(state.layers, longest(state.layers), strict=True):
        policy = layer.eviction
        if not (policy.accumulates and policy.remembers and most):
            continue
        numbers = view(state, layer, most).numbers
        assert numbers is not None
        scores, valid = run(policy, score, state, layer, most)
        slack = 1e-4 * numbers.abs().amax().clamp(min=1)
        more = valid & (scores > numbers + slack)
        case = "scores that are numbers already not to grow until another query comes"
        require(not more.any(), "counted once", policy, case, f"{int(more.sum())} that do")


def _room(policy: Eviction, spec: CacheSpec, window: int) -> int:
    """Global tokens a head, in whole pages, of which the budgets drop some in every layer."""
    room = 0
    for budget, layers in bound_layers({n: policy.at(n) for n in range(spec.layers)}):
        for stored in range(spec.page_size, 256 * spec.page_size, spec.page_size):
            counts = [[[stored] * spec.kv_heads for _ in layers]]
            seen = BudgetView(
                seen=(window + stored,), window=window, layers=tuple(layers), of=spec.layers,
                kv_heads=(spec.kv_heads,) * len(layers), counts=lambda counts=counts: counts,  # type: ignore[misc]
                scores=(torch.ones(1, spec.kv_heads, stored),) * len(layers),
            )  # fmt: skip
            if all(sum(heads) < stored * spec.kv_heads for heads in budget.targets(seen)[0]):
                room = max(room, stored)
                break
    return room


def _lengths(spec: CacheSpec, lengths: list[int]) -> list[int]:
    return [n for _ in range(spec.layers) for n in lengths for _ in range(spec.kv_heads)]


def _same_kept(
    policy: object, rule: str, found: list[list[int]], wanted: list[list[int]], case: str
) -> None:
    for a, b in zip(found, wanted, strict=True):
        if a != b:
            raise ConformanceError(rule, policy, case, f"{sorted(set(a) ^ set(b))} differing")


def _asked(pipeline: CachePipeline, state: CacheState) -> list[tuple[Budget, list[int], Counts]]:
    """What the budgets would leave now: the layers that each binds, and its targets."""
    bound = bound_layers({x.index: pipeline.eviction.at(x.index) for x in state.layers})
    return [
        (budget, layers, budget.targets(_view_of(state, budget, layers)))
        for budget, layers in bound
    ]


def _view_of(state: CacheState, budget: Budget, layers: list[int]) -> BudgetView:
    """What a budget is told of these layers, the scores too if it reads them."""
    stores, scores = [state.layers[n] for n in layers], None
    if budget.reads_scores:
        rated = zip(stores, longest(stores), strict=True)
        found = {x.index: score(state, x, most) for x, most in rated if most}
        scores = {n: s.masked_fill(~valid, float("-inf")) for n, (s, valid) in found.items()}
    return budget_view(state, stores, scores)


def _budget(
    pipeline: CachePipeline,
    state: CacheState,
    asked: list[tuple[Budget, list[int], Counts]],
    slack: int = 0,
) -> None:
    """No layer, and no sequence where layers share tokens, holds more than was asked for.

    Heads may hold `slack` tokens more. A budget's rounding may add half a token a head.
    """
    for budget, layers, targets in asked:
        held = budget_view(state, [state.layers[n] for n in layers]).counts
        for seen, target, counts in zip(state.lengths, targets, held, strict=True):
            pairs = list(zip(target, counts, strict=True))
            if budget.spans_layers:
                pairs = [(sum(target, []), sum(counts, []))]
            for place, (left, found) in enumerate(pairs):
                most = sum(left) + slack * len(found) + len(found) // 2
                where = "all layers" if budget.spans_layers else f"layer {layers[place]}"
                wanted = f"at most {most} global tokens in {where} of {seen} seen"
                require(sum(found) <= most, "budget", pipeline.eviction, wanted, f"{sum(found)}")
