"""What happens in an eviction: score every layer, then drop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .budget import TotalCap
from .eviction import AtPromptEnd
from .ops import Heads, Ring
from .store import compaction
from .store.compaction import Drop
from .store.layer import LayerStore
from .store.state import CacheState
from .store.trimming import trim


def evict(state: CacheState, rows: list[bool], decoding: bool = False) -> None:
    """One eviction for the sequences `rows`.

    While `decoding`, only layers whose policy evicts then take part. All scores and new page
    summaries come before the first drop, and so does every page that a drop takes: a policy that
    raises, or a cap, leaves the cache as it was.
    """
    layers = [
        x
        for x in state.layers
        if not (x.slides or x.eviction.neutral or (decoding and x.eviction.when != "decode"))
    ]
    targets = _targets(state, layers, rows)
    others = torch.tensor([not on for on in rows], device=state.spec.device)[:, None, None]

    def keeps() -> Iterator[tuple[LayerStore, Tensor]]:
        """Left to the device, layer by layer, while it is busy with scores."""
        for layer, scores, valid in _rated(state, layers):
            keep = valid & (scores > float("-inf"))
            budget, target = layer.eviction.budget, targets.get(layer.index)
            if target is not None and target.ndim == 2:
                keep &= state.ops.keep_best(scores, valid, target)
            elif target is not None and budget is not None:
                keep &= budget.keep_by(state.ops.keep_best, scores, valid, target)
            if not all(rows):
                keep |= others.to(keep.device)
            yield layer, keep

    _drop(state, compaction.plan(state, keeps()))
    for layer in state.layers:
        if isinstance(layer.eviction, AtPromptEnd) and not (layer.slides or decoding):
            compaction.forget_unmarked(layer, torch.tensor(rows, device=layer.ring_flags.device))
            _raise_floor(state, rows)
    for row, on in enumerate(rows):
        if on:
            state.checked[row] = state.lengths[row]


def _drop(state: CacheState, drops: list[Drop]) -> list[int]:
    """Does what was planned; CapacityError comes first. Returns the tokens dropped, by sequence."""
    takes = dict.fromkeys(state.pools.values(), 0)
    for drop in drops:
        takes[drop.pool] = drop.takes
    state.secure(takes)
    compaction.drop(state, drops)
    gone = [0] * state.batch
    for drop in drops:
        gone = [a + b for a, b in zip(gone, drop.gone, strict=True)]
    _raise_floor(state, [n > 0 for n in gone])
    for pool in state.pools.values():
        trim(pool)
    return gone


def _raise_floor(state: CacheState, rows: list[bool]) -> None:
    """Tokens of `rows` are gone for good: `crop` cannot go back to before now."""
    state.floor = [
        length if on else old
        for on, length, old in zip(rows, state.lengths, state.floor, strict=True)
    ]


def _targets(
    state: CacheState, layers: Sequence[LayerStore], rows: list[bool]
) -> dict[int, Tensor]:
    """Global tokens that budgets leave, by layer: `[B]` a head, or `[B, Hkv]` of a TotalCap."""
    capped = _capped_lengths(state, rows)
    if capped is not None:
        return _by_layer(layers, [[row[x.index] for row in capped] for x in layers])
    bound = [x for x in layers if x.eviction.budget is not None]
    return _by_layer(bound, [_allowed(state, x, rows) for x in bound])


def _by_layer(layers: Sequence[LayerStore], numbers: list) -> dict[int, Tensor]:
    """The numbers of each layer as a tensor beside it; the host copies them once."""
    if not layers:
        return {}
    every = torch.tensor(numbers, device=layers[0].counts.device)
    return {x.index: own.to(x.counts.device) for x, own in zip(layers, every, strict=True)}


def _allowed(state: CacheState, layer: LayerStore, rows: list[bool]) -> list[int]:
    """Global tokens per head `[B]` that a budget per head leaves."""
    budget = layer.eviction.budget
    assert budget is not None
    return [
        budget.allowed(length, layer.window, layer.index, state.spec.layers) if on else 0
        for length, on in zip(state.lengths, rows, strict=True)
    ]


def _rated(
    state: CacheState, layers: Sequence[LayerStore]
) -> Iterator[tuple[LayerStore, Tensor, Tensor]]:
    """Each layer that holds global tokens with `score(state, layer, ...)`.

    NaN among any scores raises when all layers are through, so that the host waits once.
    """
    names, nan = [], []
    for layer, most in zip(layers, compaction.longest(layers), strict=True):
        if most:
            scores, valid = score(state, layer, most)
            names.append(type(layer.eviction).__name__)
            nan.append(scores.isnan().any())
            yield layer, scores, valid
    if nan:
        found = torch.stack([x.to(nan[0].device) for x in nan]).tolist()
        for name, bad in zip(names, found, strict=True):
            if bad:
                raise ValueError(f"{name}.score: wanted floats without NaN, got NaN among them")


def score(state: CacheState, layer: LayerStore, most: int) -> tuple[Tensor, Tensor]:
    """Scores `[B, Hkv, N]` of a layer's global tokens by its eviction, and which slots hold one.

    `most` is the largest number of global tokens of a head. A fused eviction reads the pages
    itself; any other one sees a view of them.
    """
    policy, size = layer.eviction, state.spec.page_size
    table, valid = compaction.held(layer, most, size)
    if policy.fused is not None:
        name, options = policy.fused
        scores = getattr(state.ops, name)(
            layer.pool.pages, Heads(table, layer.counts),
            Ring(layer.ring_k, layer.ring_v, layer.ring_flags), layer.queries,
            state.lengths_on[table.device], layer.window, state.spec.softmax_scale, **options,
        )  # fmt: skip
    else:
        scores = policy.score(compaction.view(state, layer, most))
    wanted = f"{type(policy).__name__}.score: wanted floats {list(valid.shape)} without NaN"
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{wanted}, got {got}")
    if scores.shape != valid.shape:
        raise ValueError(f"{wanted}, got {list(scores.shape)}")
    return scores, valid


def _capped_lengths(state: CacheState, rows: list[bool]) -> list[list[list[int]]] | None:
    """Tokens that TotalCap leaves, `[row][layer][head]`; None without such a cap."""
    capped = [x for x in state.layers if isinstance(x.eviction.budget, TotalCap)]
    if not capped:
        return None
    budget = capped[0].eviction.budget
    assert isinstance(budget, TotalCap)
    device = state.layers[0].counts.device
    counts = torch.stack([layer.counts.to(device) for layer in state.layers]).tolist()
    per_row = [[layer[row] for layer in counts] for row in range(state.batch)]
    return [budget.lengths(c) if on else c for c, on in zip(per_row, rows, strict=True)]


def shrink_to(state: CacheState, targets: list[list[list[int]]]) -> list[int]:
    """Leaves the best `targets[row][i][head]` global tokens in the i-th layer that policies manage.

    All or nothing, as `evict`. Returns the tokens dropped, by sequence.
    """
    layers = [x for x in state.layers if not x.slides]
    best = _by_layer(layers, [[row[place] for row in targets] for place in range(len(layers))])
    keeps = (
        (layer, state.ops.keep_best(scores, valid, best[layer.index]))
        for layer, scores, valid in _rated(state, layers)
    )
    return _drop(state, compaction.plan(state, keeps))
