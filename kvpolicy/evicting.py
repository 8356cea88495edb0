"""What happens in an eviction: score every layer, then drop."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import TotalCap, keep_best
from .eviction import AtPromptEnd, Eviction
from .store import compaction
from .store.compaction import Drop
from .store.state import CacheState, LayerStore
from .types import EvictionView


def evict(state: CacheState, rows: list[bool], decoding: bool = False) -> None:
    """One eviction for the sequences `rows`.

    While `decoding`, only layers whose policy evicts then take part. All scores come before the
    first drop, and so does every page that a drop takes: a policy that raises, or a cap, leaves the
    cache as it was.
    """
    drops: list[Drop] = []
    targets = _capped_lengths(state, rows)
    for layer in state.layers:
        policy = layer.eviction
        if layer.slides or policy.neutral or (decoding and policy.when != "decode"):
            continue
        allowed = _allowed(state, layer, rows)
        if not int(layer.counts.max()):
            continue
        view = compaction.view(state, layer)
        scores = _scores(policy, view)
        keep = view.valid & (scores > float("-inf"))
        if targets is not None:
            amount = torch.tensor([row[layer.index] for row in targets], device=keep.device)
            keep = keep & keep_best(scores, view.valid, amount)
        elif allowed is not None and policy.budget is not None:
            keep = keep & policy.budget.keep(scores, view.valid, allowed)
        keep = keep | ~torch.tensor(rows, device=keep.device)[:, None, None]
        drops.append(compaction.plan(state, layer, keep))
        del view, scores
    takes = dict.fromkeys(state.pools.values(), 0)
    for drop in drops:
        takes[drop.layer.pool] += drop.takes
    state.secure(takes)
    changed = [False] * state.batch
    for drop in drops:
        compaction.drop(state, drop)
        changed = [was or n > 0 for was, n in zip(changed, drop.gone, strict=True)]
    for layer in state.layers:
        if isinstance(layer.eviction, AtPromptEnd) and not (layer.slides or decoding):
            compaction.forget_unmarked(layer, torch.tensor(rows, device=layer.ring_flags.device))
            changed = rows
    for row, on in enumerate(rows):
        if on:
            state.checked[row] = state.lengths[row]
            state.floor[row] = state.lengths[row] if changed[row] else state.floor[row]
    for pool in state.pools.values():
        pool.trim()


def _allowed(state: CacheState, layer: LayerStore, rows: list[bool]) -> Tensor | None:
    """Global tokens per head `[B]` that a budget per head leaves; None without one."""
    budget = layer.eviction.budget
    if budget is None or isinstance(budget, TotalCap):
        return None
    allowed = [
        budget.allowed(length, layer.window, layer.index, state.spec.layers) if on else 0
        for length, on in zip(state.lengths, rows, strict=True)
    ]
    return torch.tensor(allowed, device=layer.counts.device)


def _scores(policy: Eviction, view: EvictionView) -> Tensor:
    wanted = f"{type(policy).__name__}.score: wanted floats {list(view.valid.shape)} without NaN"
    scores = policy.score(view)
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{wanted}, got {got}")
    if scores.shape != view.valid.shape:
        raise ValueError(f"{wanted}, got {list(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"{wanted}, got NaN among them")
    return scores


def _capped_lengths(state: CacheState, rows: list[bool]) -> list[list[list[int]]] | None:
    """Tokens that TotalCap leaves, `[row][layer][head]`; None without such a cap."""
    capped = [x for x in state.layers if isinstance(x.eviction.budget, TotalCap)]
    if not capped:
        return None
    budget = capped[0].eviction.budget
    assert isinstance(budget, TotalCap)
    counts = [layer.counts.tolist() for layer in state.layers]
    per_row = [[layer[row] for layer in counts] for row in range(state.batch)]
    return [budget.lengths(c) if on else c for c, on in zip(per_row, rows, strict=True)]
