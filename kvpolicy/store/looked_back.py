"""A replay: what the tokens of a cache were worth to others that looked back at them."""

from __future__ import annotations

from typing import NamedTuple

import attrs
import torch

from ..ops import ADMITTED, Numbers, ring_slot
from .fork import select_rows
from .layer import LayerStore
from .state import CacheState


class LookBack(NamedTuple):
    """Which tokens a replay looks back at: positions `low` to before `high`.

    Softmaxes run over these, the first `sinks` tokens and the replay's own, which begin at
    positions `own` `[B]`.
    """

    sinks: int
    low: int
    high: int
    own: tuple[int, ...]


def looks_back(layer: LayerStore) -> bool:
    """Whether a replay changes a layer's numbers."""
    return layer.numbers is not None and layer.eviction.replayed


def fork_to_replay(state: CacheState, sinks: int, span: range) -> CacheState:
    """A fork whose prompt calls look back; no cap on tokens acts in it."""
    fork = select_rows(state, range(state.batch))
    fork.spec = attrs.evolve(state.spec, max_tokens=None, at_cap="raise")
    fork.looks_back = LookBack(sinks, span.start, span.stop, tuple(state.lengths))
    return fork


def adopt_numbers(state: CacheState, fork: CacheState) -> None:
    """Takes over the numbers that a fork has for the tokens of `state`, and says that it did."""
    for mine, theirs in zip(state.layers, fork.layers, strict=True):
        if mine.numbers is None or theirs.numbers is None or not looks_back(mine):
            continue
        _adopt(mine, mine.numbers, theirs.numbers, state.on(mine).lengths, fork.on(theirs).lengths)
    for row in state.sequences:
        row.replayed_at = row.length


def _adopt(
    layer: LayerStore, mine: Numbers, theirs: Numbers, lengths: torch.Tensor, after: torch.Tensor
) -> None:
    width = min(mine.stored.shape[2], theirs.stored.shape[2])
    mine.stored[..., :width] = theirs.stored[..., :width]
    # Tokens in the window: in the fork those admitted have become the next global ones.
    at = lengths[:, None] - layer.window + torch.arange(layer.window, device=lengths.device)
    slot = ring_slot(at, layer.ring.slots)[:, None].expand(-1, layer.counts.shape[1], -1)
    admitted = ((layer.ring.flags.gather(2, slot) & ADMITTED) > 0) & (at >= 0)[:, None]
    index = layer.counts[..., None] + admitted.cumsum(2) - 1
    index = index.clamp(0, theirs.stored.shape[2] - 1)
    left = (at < after[:, None] - layer.window)[:, None].expand_as(slot)
    near, own = theirs.recent.gather(2, slot), mine.recent.gather(2, slot)
    far = torch.where(admitted, theirs.stored.gather(2, index), own)
    mine.recent.scatter_(2, slot, torch.where(left, far, near))
