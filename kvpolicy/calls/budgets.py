"""Asking the budgets of an eviction: how many tokens stay, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..budget import Budget, BudgetView, Counts, bound_layers, budget_of
from ..exchange import ALONE, Exchange, own_heads
from ..store.layer import LayerStore
from ..store.state import CacheState


def targets_of(
    state: CacheState, layers: Sequence[LayerStore], scores: Mapping[int, Tensor] | None = None
) -> dict[int, list[list[int]]]:
    """Global tokens `[B][Hkv]` that budgets leave, by layer; a budget is asked once.

    Of all ranks' heads where a budget shares tokens between them, else of the heads here.
    `scores` `[B, Hkv, N]` of the layers, -inf where no token is, if a budget reads them.
    """
    found: dict[int, list[list[int]]] = {}
    for budget, own in bound_layers({x.index: x.eviction for x in layers}):
        exchange = state.exchange if budget.shares_heads else ALONE
        view = budget_view(state, [state.layers[n] for n in own], scores, exchange)
        targets = budget.targets(view)
        _check_targets(budget, targets, view)
        found |= {n: [row[i] for row in targets] for i, n in enumerate(own)}
    return found


def read_scores(layers: Sequence[LayerStore]) -> bool:
    """Whether a budget of these layers reads scores."""
    budgets = (budget_of(layer.eviction) for layer in layers)
    return any(budget is not None and budget.reads_scores for budget in budgets)


def budget_view(
    state: CacheState,
    layers: Sequence[LayerStore],
    scores: Mapping[int, Tensor] | None = None,
    exchange: Exchange = ALONE,
) -> BudgetView:
    """What a budget is told of the layers that it binds, which share a window."""
    here = [x.counts.shape[1] for x in layers]

    def own() -> Tensor:
        return torch.cat([x.counts.to(layers[0].device) for x in layers], 1)

    def counts() -> Counts:
        ends = list(accumulate(here))
        flat = own().tolist()
        return [[row[a:b] for a, b in pairwise([0, *ends])] for row in flat]

    found = None if scores is None else tuple(_scores_of(x, scores) for x in layers)
    if exchange.parts > 1:  # whether a budget looks or not
        gathered = _gathered(exchange, own(), here)
        counts = lambda: gathered  # noqa: E731
        found = None if found is None else tuple(map(exchange.heads, found))
    return BudgetView(
        seen=tuple(state.lengths),
        window=layers[0].window,
        layers=tuple(x.index for x in layers),
        of=state.spec.layers,
        kv_heads=tuple(n * exchange.parts for n in here),
        counts=counts,
        scores=found,
    )


def _gathered(exchange: Exchange, own: Tensor, here: Sequence[int]) -> Counts:
    """Counts `[B, sum(here)]` of layers one after the other, of all parts: `[row][layer][head]`."""
    parts = exchange.heads(own).unflatten(1, (exchange.parts, -1)).split(list(here), 2)
    rows = zip(*(x.flatten(1).tolist() for x in parts), strict=True)
    return [list(row) for row in rows]


def _scores_of(layer: LayerStore, scores: Mapping[int, Tensor]) -> Tensor:
    """Those of a layer; one that holds no global token has none."""
    none = torch.zeros(*layer.counts.shape, 0, device=layer.device)
    return scores.get(layer.index, none)


def _check_targets(budget: Budget, targets: Counts, view: BudgetView) -> None:
    shape = [list(view.kv_heads)] * len(view.seen)
    try:
        fits = [[len(heads) for heads in row] for row in targets] == shape and all(
            isinstance(n, int) and n >= 0 for row in targets for heads in row for n in heads
        )
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{type(budget).__name__}.targets: wanted ints from 0 as [row][layer][head] of "
            f"{len(view.seen)} sequences and {list(view.kv_heads)} heads, got {targets!r}"
        )


def keep_within(
    budget: Budget, state: CacheState, layer: LayerStore, scores: Tensor, valid: Tensor,
    target: Tensor,
) -> Tensor:  # fmt: skip
    """The tokens `[B, Hkv, N]` that a budget keeps of a layer; `target` as `targets_of` says."""
    exchange = state.exchange
    if budget.shares_heads and exchange.parts > 1:
        if budget.pools_heads:
            of_all = exchange.heads(scores), exchange.heads(valid)
            return own_heads(exchange, _kept(budget, state, layer, *of_all, target))
        target = own_heads(exchange, target)
    return _kept(budget, state, layer, scores, valid, target)


def _kept(
    budget: Budget, state: CacheState, layer: LayerStore, scores: Tensor, valid: Tensor,
    target: Tensor,
) -> Tensor:  # fmt: skip
    keep = budget.keep(scores, valid, target, layer.window, state.ops.keep_best)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != valid.shape:
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else repr(keep)
        raise ValueError(
            f"{type(budget).__name__}.keep: wanted a bool tensor {list(valid.shape)}, got {got}"
        )
    return keep
