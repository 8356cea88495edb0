"""A number of each stored token: where it lies, and how it moves with its token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eviction import Eviction
from ..ops import ADMITTED, POSITION_MASK, Segments, ring_slot
from .layer import LayerStore
from .ring import recent
from .state import CacheState

STEP = 256  # numbers of a head are held for a multiple of so many tokens, so that few moves come


def has_numbers(eviction: Eviction) -> bool:
    """Whether an eviction asks for a number of each token."""
    return bool(eviction.numbered or eviction.accumulates or eviction.remembers)


def counts_queries(layer: LayerStore) -> bool:
    """Whether what reads a layer changes its numbers."""
    policy = layer.eviction
    return layer.numbers is not None and bool(policy.accumulates) and not policy.replayed


def capacity_of(tokens: int) -> int:
    """Numbers that are held for heads of so many tokens: few sizes, so that graphs stay valid."""
    step = max(STEP, (1 << tokens.bit_length()) >> 3)
    return max(-(-tokens // step), 1) * step


def widen(state: CacheState, tokens: int) -> None:
    """Makes room for the numbers of heads of `tokens` global tokens."""
    wanted, wider = capacity_of(tokens), False
    for layer in state.layers:
        if layer.numbers is not None and layer.numbers.stored.shape[2] < tokens:
            _resize(layer, wanted)
            wider = True
    if wider:
        state.moved()


def narrow(state: CacheState, tokens: int) -> None:
    """Gives back what is more than twice the room of heads of `tokens` global tokens."""
    wanted, smaller = capacity_of(tokens), False
    for layer in state.layers:
        if layer.numbers is not None and layer.numbers.stored.shape[2] >= 2 * wanted:
            _resize(layer, wanted)
            smaller = True
    if smaller:
        state.moved()


def _resize(layer: LayerStore, width: int) -> None:
    assert layer.numbers is not None
    stored = layer.numbers.stored
    new = stored.new_zeros(*stored.shape[:2], width)
    kept = min(width, stored.shape[2])
    new[..., :kept] = stored[..., :kept]
    layer.numbers = layer.numbers._replace(stored=new)


def most_stored(layers: Sequence[LayerStore]) -> int:
    """Global tokens of the longest head of layers with numbers, 0 without any; waits for one."""
    return most_of([layer.counts for layer in layers if layer.numbers is not None])


def most_of(counts: Sequence[Tensor]) -> int:
    """The largest of counts that may lie on several devices, 0 of none; waits for one."""
    most = [x.amax() for x in counts]
    return int(torch.stack([x.to(most[0].device) for x in most]).amax()) if most else 0


def held(layer: LayerStore) -> Tensor:
    """Numbers of the global tokens, as many as the longest head has; 0 after a head's last."""
    assert layer.numbers is not None
    most = int(layer.counts.amax())
    there = torch.arange(most, device=layer.device) < layer.counts[..., None]
    return layer.numbers.stored[..., :most].masked_fill(~there, 0)


def hold(state: CacheState, layer: LayerStore, numbers: Tensor) -> None:
    """Puts back what `held` gave."""
    most = numbers.shape[2]
    widen(state, most)
    assert layer.numbers is not None
    layer.numbers.stored[..., :most] = numbers.to(layer.device)


def promote(
    layer: LayerStore, given: Tensor | None, flags: Tensor, before: Tensor, seg: Segments,
    shared: dict[Any, Any],
) -> Tensor:  # fmt: skip
    """Puts the numbers of tokens that leave the window in a prompt call beside the pages.

    `given` `[Hkv, T]` are those of the new tokens (None: 0), `flags` `[Hkv, Tk]` of the recent
    ones, `before` `[B, Hkv]` the global tokens before the call. Returns the recent tokens' numbers
    `[Hkv, Tk]`; `settle` puts back those that stay in the ring. What layers of a call need alike is
    in `shared`.
    """
    assert layer.numbers is not None
    stored, ring = layer.numbers
    new = ring.new_zeros(ring.shape[1], seg.cu_q[-1]) if given is None else given.to(ring)
    numbers = recent(ring, new, seg)
    if numbers is given:
        numbers = numbers.clone()
    kv_heads, width = stored.shape[1:]
    key = "leaving", seg.cu_k, layer.window, kv_heads, ring.device
    if key not in shared:
        rows, at, ends = seg.places()
        head = torch.arange(kv_heads, device=ring.device)[:, None]
        shared[key] = rows, at < ends - layer.window, rows * kv_heads + head, seg.cu_k_dev.long()
    rows, old, units, cu_k = shared[key]
    leaves = ((flags & ADMITTED) > 0) & old
    running = F.pad(leaves.cumsum(1), (1, 0))
    base = running[:, cu_k]  # [Hkv, B + 1]
    index = before.T[:, rows] + running[:, 1:] - 1 - base[:, rows]
    # Heads one after the other, each with a place more for what stays.
    place = units * (width + 1) + torch.where(leaves, index, width)
    wide = F.pad(stored, (0, 1))
    wide.view(-1).scatter_(0, place.flatten(), numbers.flatten())
    stored.copy_(wide[..., :width])
    return numbers


def keep_recent(layer: LayerStore, numbers: Tensor, seg: Segments, shared: dict[Any, Any]) -> None:
    """Writes numbers `[Hkv, Tk]` of recent tokens to the ring's slots of those it will hold."""
    assert layer.numbers is not None
    ring = layer.numbers.recent
    slots = ring.shape[2]
    for row, start in enumerate(seg.start):
        new, low, high = seg.cu_q[row + 1] - seg.cu_q[row], seg.cu_k[row], seg.cu_k[row + 1]
        if new:
            count = min(high - low, slots)
            key = "kept", start + new, count, slots, ring.device
            if key not in shared:
                at = torch.arange(start + new - count, start + new, device=ring.device)
                shared[key] = ring_slot(at, slots)
            ring[row].index_copy_(1, shared[key], numbers[:, high - count : high])


def unpromote(state: CacheState, layer: LayerStore, counts: Tensor) -> None:
    """Tokens from `counts` `[B, Hkv]` on are back in the window: their numbers go to the ring."""
    if layer.numbers is None:
        return
    most = min(int((layer.counts - counts).amax()), state.spec.rollback)
    if not most:
        return
    stored, ring = layer.numbers
    index = counts[..., None] + torch.arange(most, dtype=torch.int32, device=counts.device)
    back = index < layer.counts[..., None]
    meta = state.ops.read_tokens(layer.pool.pages, layer.table, index.masked_fill(~back, -1))[2]
    slots = ring.shape[2]
    slot = torch.where(back, ring_slot(meta & POSITION_MASK, slots), slots).long()
    wide = F.pad(ring, (0, 1))
    wide.scatter_(2, slot, stored.gather(2, index.long().clamp(max=stored.shape[2] - 1)))
    ring.copy_(wide[..., :slots])


def remember(layer: LayerStore, scores: Tensor, rows: Tensor) -> None:
    """Scores `[B, Hkv, N]` become the numbers of the global tokens of `rows`, bool `[B]`."""
    assert layer.numbers is not None
    width = min(scores.shape[2], layer.numbers.stored.shape[2])
    here = layer.numbers.stored[..., :width]
    here.copy_(torch.where(rows[:, None, None], scores[..., :width].to(here), here))


def move_kept(layer: LayerStore, keep: Tensor, changed: Tensor) -> None:
    """Numbers of tokens with `keep` `[B, Hkv, N]` move together, in heads with `changed`."""
    if layer.numbers is None:
        return
    stored = layer.numbers.stored
    width, n = stored.shape[2], min(keep.shape[2], stored.shape[2])
    place = keep.cumsum(-1).sub_(1).masked_fill_(~keep, width)
    moved = stored.new_zeros(*stored.shape[:2], width + 1)
    moved.scatter_(2, place[..., :n], stored[..., :n])
    stored.copy_(torch.where(changed[..., None], moved[..., :width], stored))
