"""What happens in an eviction: score every layer, then drop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..budget import budget_of
from ..errors import CapacityError, PhaseError
from ..exchange import ALONE, Exchange
from ..store import compaction
from ..store.compaction import Drop
from ..store.layer import LayerStore
from ..store.numbers import most_stored, narrow, remember
from ..store.state import CacheState
from .budgets import keep_within, read_scores, targets_of
from .due import DueRows
from .score import Shared, largest, longest, score
from .settle import settle


def evict(state: CacheState, rows: list[bool], decoding: bool = False) -> None:
    """One eviction for the sequences `rows`.

    While `decoding`, only layers whose policy evicts then take part. All scores and new page
    summaries come before the first drop, and so does every page that a drop takes: a policy that
    raises, or a cap, leaves the cache as it was, on all ranks.
    """
    with state.unbroken():
        _evict(state, rows, decoding)


def _evict(state: CacheState, rows: list[bool], decoding: bool) -> None:
    layers = [
        x
        for x in state.layers
        if not (x.slides or x.eviction.neutral or (decoding and x.eviction.when != "decode"))
    ]
    _check_replayed(state, layers, rows)
    remembered: dict[int, Tensor] = {}
    reads = read_scores(layers)
    # Budgets that read scores compare what they read; else only sequences that are due are scored.
    due = None if all(rows) or reads else DueRows(state, [n for n, on in enumerate(rows) if on])
    exchange = _listens(state, layers)
    counts = [x.counts for x in layers]
    parts = counts if due is None else list(map(due.pick, counts))
    numbers = largest(counts if due is None else [*counts, *parts], exchange)
    widths = dict(zip((x.index for x in layers), numbers, strict=False))
    rated, scores = _rated(state, layers, numbers[-len(layers) :], remembered, due), None
    if reads:
        rated = iter(found := list(rated))
        scores = {x.index: s.masked_fill(~valid, float("-inf")) for x, s, valid in found}
    asked = targets_of(state, layers, scores)
    targets = _by_layer([x for x in layers if x.index in asked], asked)
    others = None
    if due is None and not all(rows):
        others = torch.tensor([not on for on in rows], device=state.spec.device)[:, None, None]

    def keeps() -> Iterator[tuple[LayerStore, Tensor]]:
        """Left to the device, layer by layer, while it is busy with scores."""
        for layer, scores, valid in rated:
            keep = valid & (scores > float("-inf"))
            budget = budget_of(layer.eviction)
            if budget is not None:
                target = targets[layer.index]
                target = target if due is None else due.pick(target)
                keep &= keep_within(budget, state, layer, scores, valid, target)
            if due is not None:
                keep = due.spread(keep, max(widths[layer.index], keep.shape[2]), True)
                keep = compaction.of_tokens(layer, keep)
            elif others is not None:
                keep |= others.to(keep.device)
                keep &= valid
            yield layer, keep

    _drop(state, compaction.plan(state, keeps()), remembered)
    for layer in state.layers:
        if layer.eviction.forgets_window and not (layer.slides or decoding):
            _raise_floor(state, rows)
            compaction.forget_unmarked(layer, torch.tensor(rows, device=layer.device))
    for row, on in zip(state.sequences, rows, strict=True):
        if on:
            row.considered_at = row.length


def _check_replayed(state: CacheState, layers: Sequence[LayerStore], rows: list[bool]) -> None:
    """Raises PhaseError where an eviction wants a replay that has not been."""
    named = [type(x.eviction).__name__ for x in layers if x.eviction.replayed]
    for place, (row, on) in enumerate(zip(state.sequences, rows, strict=True)):
        if named and on and row.length and row.replayed_at != row.length:
            raise PhaseError(
                f"{named[0]}: its numbers come from a replay, and sequence {place} of {row.length} "
                f"tokens was replayed at {row.replayed_at or 'no length'}; before the prompt ends, "
                "run tokens that look back in pipeline.replay(state), or attached.replay(cache, "
                "ids)"
            )


def _drop(state: CacheState, drops: list[Drop], remembered: Mapping[int, Tensor]) -> list[int]:
    """Does what was planned; CapacityError comes first. Returns the tokens dropped, by sequence.

    `remembered` are scores by layer that become the numbers of tokens which stay. A sequence loses
    tokens where one of its heads does, on any rank; those dropped here are counted.
    """
    gone = [sum(tokens) for tokens in zip(*(drop.gone for drop in drops), strict=True)]
    gone = gone or [0] * state.batch
    with state.unbroken():
        full = _provide(state, drops)
        told = state.exchange.numbers([full is not None, *gone])
        if any(part[0] for part in told):
            raise full or CapacityError("another rank has no room to move what an eviction keeps")
        loses = [any(row) for row in zip(*(part[1:] for part in told), strict=True)]
        _raise_floor(state, loses)
        for index, scores in remembered.items():
            layer = state.layers[index]
            remember(layer, scores, torch.tensor(loses, device=layer.device))
        compaction.drop(state, drops)
        if any(loses):
            narrow(state, most_stored(state.layers) + state.spec.interval)
        state.trim()
    return gone


def _provide(state: CacheState, drops: Sequence[Drop]) -> CapacityError | None:
    """Pages for what moves; the error where there are too few."""
    try:
        state.provide({drop.pool: drop.takes for drop in drops})
    except CapacityError as error:
        return error
    return None


def _raise_floor(state: CacheState, rows: list[bool]) -> None:
    """Tokens of `rows` go for good: `crop` cannot go back to before now, so no query waits."""
    settle(state, [row.length if on else 0 for row, on in zip(state.sequences, rows, strict=True)])
    for row, on in zip(state.sequences, rows, strict=True):
        if on:
            row.evicted_at = row.length
    if any(rows):
        state.devices.write_final(state.sequences, state.spec.rollback)


def _by_layer(
    layers: Sequence[LayerStore], numbers: Mapping[int, list[list[int]]]
) -> dict[int, Tensor]:
    """Numbers `[B][Hkv]` of each layer as a tensor beside it; the host copies them once."""
    if not layers:
        return {}
    flat = [n for x in layers for row in numbers[x.index] for n in row]
    sizes = [sum(map(len, numbers[x.index])) for x in layers]
    parts = torch.tensor(flat, device=layers[0].device).split(sizes)
    shaped = zip(layers, parts, strict=True)
    return {x.index: n.view(len(x.counts), -1).to(x.device) for x, n in shaped}


def _rated(
    state: CacheState, layers: Sequence[LayerStore], most: Sequence[int],
    remembered: dict[int, Tensor], due: DueRows | None = None,
) -> Iterator[tuple[LayerStore, Tensor, Tensor]]:  # fmt: skip
    """Each layer that holds global tokens with `score(state, layer, ...)`, of rows that are due.

    `most` are the global tokens of the longest heads. Puts the scores of policies that remember
    them into `remembered`. NaN among any scores raises when all layers are through, so that the
    host waits once.
    """
    names, nan = [], []
    shared: Shared = {}
    for layer, tokens in zip(layers, most, strict=True):
        if tokens:
            if due is None:
                scores, valid = score(state, layer, tokens, shared)
            else:
                scores, valid = score(due.state, due.of(layer), tokens, shared)
            names.append(type(layer.eviction).__name__)
            nan.append(scores.amax())  # NaN if there is one
            if layer.eviction.remembers:
                whole = scores if due is None else due.spread(scores, scores.shape[2], 0.0)
                remembered[layer.index] = whole
            yield layer, scores, valid
    if nan:
        found = torch.stack([x.to(nan[0]) for x in nan]).isnan().tolist()
        for name, bad in zip(names, found, strict=True):
            if bad:
                raise ValueError(f"{name}.score: wanted floats without NaN, got NaN among them")


def _listens(state: CacheState, layers: Sequence[LayerStore]) -> Exchange:
    """The other ranks, where what stays of a layer depends on their heads."""
    return state.exchange if any(map(_looks_across, layers)) else ALONE


def _looks_across(layer: LayerStore) -> bool:
    """Whether what stays of a layer depends on heads of other ranks."""
    budget = budget_of(layer.eviction)
    return layer.eviction.across_heads or (budget is not None and budget.shares_heads)


def shrink_to(state: CacheState, targets: list[list[list[int]]]) -> list[int]:
    """Leaves the best `targets[row][i][head]` global tokens in the i-th layer that policies manage.

    All or nothing, as `evict`. Returns the tokens dropped, by sequence.
    """
    with state.unbroken():
        return _shrink_to(state, targets)


def _shrink_to(state: CacheState, targets: list[list[list[int]]]) -> list[int]:
    layers = [x for x in state.layers if not x.slides]
    best = _by_layer(
        layers, {x.index: [row[place] for row in targets] for place, x in enumerate(layers)}
    )
    remembered: dict[int, Tensor] = {}
    most = longest(layers, _listens(state, layers))
    keeps = (
        (layer, state.ops.keep_best(scores, valid, best[layer.index]))
        for layer, scores, valid in _rated(state, layers, most, remembered)
    )
    return _drop(state, compaction.plan(state, keeps), remembered)
