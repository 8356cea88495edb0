"""Writing to ring and pages: one path for prompt calls, one for decoded tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import ADMITTED, POSITION_BITS, Segments
from .state import CacheState, LayerStore


def segments(state: CacheState, device: torch.device) -> Segments:
    """The open prompt call's segments on a device; recents are the ring's tokens and new ones."""
    call = state.call
    assert call is not None
    if device not in call.segments:
        window = max(layer.window for layer in state.layers)
        call.segments[device] = _segments(state.lengths, call.added, window, device)
    return call.segments[device]


def _segments(
    lengths: list[int], added: tuple[int, ...], window: int, device: torch.device
) -> Segments:
    cu_q, cu_k = [0], [0]
    for length, new in zip(lengths, added, strict=True):
        cu_q.append(cu_q[-1] + new)
        cu_k.append(cu_k[-1] + (min(length, window) + new if new else 0))
    numbers = [cu_q, cu_k, list(lengths)]
    on = [torch.tensor(n, dtype=torch.int32, device=device) for n in numbers]
    return Segments(tuple(cu_q), tuple(cu_k), tuple(lengths), *on)


def layer_segments(state: CacheState, layer: LayerStore) -> Segments:
    """Segments with this layer's own window (layers that slide may differ from the rest)."""
    call = state.call
    assert call is not None
    widest = max(other.window for other in state.layers)
    if layer.window == widest or not any(state.lengths):
        return segments(state, layer.ring_k.device)
    return _segments(state.lengths, call.added, layer.window, layer.ring_k.device)


def recent(layer: LayerStore, seg: Segments, new: Tensor, ring: Tensor) -> Tensor:
    """New tokens `[Hkv, T, ...]` preceded, per sequence, by the ring's `[B, Hkv, slots, ...]`."""
    if seg.cu_q == seg.cu_k:
        return new
    parts = []
    for row, start in enumerate(seg.start):
        q0, q1 = seg.cu_q[row : row + 2]
        old = seg.cu_k[row + 1] - seg.cu_k[row] - (q1 - q0)
        if old:
            slot = torch.arange(start - old, start, device=new.device) % ring.shape[2]
            parts.append(ring[row].index_select(1, slot))
        parts.append(new[:, q0:q1])
    return torch.cat(parts, 1)


def write_prompt(
    state: CacheState, layer: LayerStore, seg: Segments, key: Tensor, value: Tensor, flags: Tensor
) -> None:
    """Appends to pages every admitted token that has left the window when this call ends.

    `key`, `value` `[Hkv, Tk, D]` and `flags` `[Hkv, Tk]` are the recent tokens of `seg`.
    """
    call = state.call
    assert call is not None
    call.before.setdefault(layer.index, layer.counts.clone())
    if layer.slides:
        return
    device = key.device
    rows, at, ends = _places(seg, device)
    admitted = ((flags & ADMITTED) > 0) & (at < ends - layer.window)
    running = torch.nn.functional.pad(admitted.int().cumsum(1, dtype=torch.int32), (1, 0))
    base = running[:, seg.cu_k_dev.long()]  # [Hkv, B + 1]
    added = (base[:, 1:] - base[:, :-1]).T
    if not int(added.sum()):
        return
    before = layer.counts.clone()
    after = before + added
    _give_pages(state, layer, before, after)
    index = before.T[:, rows] + running[:, 1:] - 1 - base[:, rows]
    dest = torch.where(admitted, index, -1).int()
    meta = at.int() | ((flags.int() >> 1) & 1) << POSITION_BITS
    state.ops.append(layer.pool.pages, layer.table, key, value, meta, dest, rows.int())
    layer.counts.copy_(after)
    summarize(state, layer, before, after)


def _places(seg: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence, position and the sequence's new length, `[Tk]` each."""
    cu = seg.cu_k_dev.long()
    spans = cu[1:] - cu[:-1]
    rows = torch.repeat_interleave(
        torch.arange(len(seg.start), device=device), spans, output_size=seg.cu_k[-1]
    )
    ends = seg.start_dev.long() + seg.cu_q_dev[1:].long() - seg.cu_q_dev[:-1].long()
    at = torch.arange(seg.cu_k[-1], device=device) - cu[1:][rows] + ends[rows]
    return rows, at, ends[rows]


def _give_pages(state: CacheState, layer: LayerStore, before: Tensor, after: Tensor) -> None:
    """Takes pages for heads that grow from `before` to `after` tokens, into the table."""
    size = state.spec.page_size
    have, want = _ceil(before, size), _ceil(after, size)
    column = torch.arange(layer.table.shape[2], device=before.device)
    fresh = (column >= have[..., None]) & (column < want[..., None])
    count = int((want - have).sum())
    if count:
        ids = layer.pool.take(count)
        order = (fresh.flatten().cumsum(0) - 1).clamp(min=0)
        layer.table.copy_(torch.where(fresh, ids[order].view(fresh.shape), layer.table))


def summarize(state: CacheState, layer: LayerStore, before: Tensor, after: Tensor) -> None:
    """Recomputes the summaries of pages that hold tokens from index `before` up to `after`."""
    if layer.selection.neutral or layer.slides:
        return
    size = state.spec.page_size
    column = torch.arange(layer.table.shape[2], device=before.device)
    touched = (column >= (before // size)[..., None]) & (column < _ceil(after, size)[..., None])
    b, h, m = touched.nonzero(as_tuple=True)
    if b.numel():
        refresh_summary(
            state, layer, layer.table[b, h, m], (after[b, h] - m * size).clamp(max=size)
        )


def refresh_summary(state: CacheState, layer: LayerStore, ids: Tensor, counts: Tensor) -> None:
    """Computes the summaries of pages `ids` `[N]` holding `counts` `[N]` tokens."""
    keys = state.ops.read_pages(layer.pool.pages, ids)[0]
    valid = torch.arange(keys.shape[1], device=ids.device) < counts[:, None]
    summary = layer.selection.summarize(keys, valid)
    if summary.ndim != 2 or summary.shape[0] != keys.shape[0]:
        raise ValueError(
            f"{type(layer.selection).__name__}.summarize: wanted [{keys.shape[0]}, S], got "
            f"{list(summary.shape)}"
        )
    width = layer.pool.pages.summary.shape[1]  # type: ignore[union-attr]
    summary = torch.nn.functional.pad(summary, (0, width - summary.shape[1]))
    state.ops.write_summary(layer.pool.pages, ids, summary)


def write_ring(
    state: CacheState, layer: LayerStore, seg: Segments, key: Tensor, value: Tensor, flags: Tensor
) -> None:
    """Puts the last new tokens of each sequence into the ring, keeping what abort needs."""
    call = state.call
    assert call is not None
    ring = (layer.ring_k, layer.ring_v, layer.ring_flags)
    if any(state.lengths) and layer.index not in call.undo:
        call.undo[layer.index] = tuple(t.clone() for t in ring)
    slots = layer.ring_k.shape[2]
    for row, start in enumerate(seg.start):
        q0, q1 = seg.cu_q[row : row + 2]
        new = min(q1 - q0, slots)
        if new:
            slot = torch.arange(start + q1 - q0 - new, start + q1 - q0, device=key.device) % slots
            for target, source in zip(ring, (key, value, flags), strict=True):
                target[row].index_copy_(1, slot, source[:, q1 - new : q1])


def write_queries(state: CacheState, layer: LayerStore, seg: Segments, query: Tensor) -> None:
    """Remembers the last queries `[Hq, T, D]` of each sequence for an eviction."""
    if layer.queries is None:
        return
    call = state.call
    assert call is not None
    if any(state.lengths) and layer.index in call.undo and len(call.undo[layer.index]) == 3:
        call.undo[layer.index] = (*call.undo[layer.index], layer.queries.clone())
    slots = layer.queries.shape[2]
    for row, start in enumerate(seg.start):
        q0, q1 = seg.cu_q[row : row + 2]
        new = min(q1 - q0, slots)
        if new:
            slot = torch.arange(start + q1 - q0 - new, start + q1 - q0, device=query.device) % slots
            layer.queries[row].index_copy_(1, slot, query[:, q1 - new : q1])


def write_token(
    state: CacheState,
    layer: LayerStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    lengths: Tensor,
    active: Tensor,
) -> None:
    """Writes a decoded token a sequence: `key`, `value` `[B, Hkv, D]`, `flags` `[B, Hkv]` uint8."""
    fused = layer.selection.fused == "quest_select"
    pages = layer.pool.pages
    ring = (layer.ring_k, layer.ring_v, layer.ring_flags)
    state.ops.decode_write(
        pages, layer.table, layer.counts, *ring, key, value, flags, lengths, active, layer.window,
        minmax=fused and not layer.slides,
    )  # fmt: skip
    if not (fused or layer.selection.neutral or layer.slides):
        # The page that may have been touched is the last one of each head.
        size = state.spec.page_size
        last = ((layer.counts - 1) // size).clamp(min=0).long()
        ids = layer.table.gather(2, last[..., None])[..., 0]
        held = (layer.counts - last.int() * size).flatten()
        refresh_summary(state, layer, ids.flatten(), held)
    if layer.queries is not None:
        slot = (lengths % layer.queries.shape[2]).view(-1, 1, 1, 1).expand(-1, *query.shape[1:], 1)
        slot = slot.transpose(2, 3)
        old = layer.queries.gather(2, slot)
        new = torch.where(active.view(-1, 1, 1, 1), query[:, :, None], old)
        layer.queries.scatter_(2, slot, new)


def _ceil(counts: Tensor, size: int) -> Tensor:
    return (counts + size - 1) // size
