"""Writing to ring and pages: one path for prompt calls, one for decoded tokens."""

from __future__ import annotations

from itertools import chain, pairwise

import torch
from torch import Tensor

from ..ops import Bounds, Heads, Ring, Segments, ring_slot
from .layer import LayerStore
from .room import make_room
from .state import CacheState

SCRATCH = 64 << 20  # bytes of keys and values that are read at once for summaries


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
    slots = ring.shape[2]
    if len(seg.start) == 1:
        end = seg.start[0]
        at = torch.arange(end - seg.cu_k[1] + seg.cu_q[1], end, device=new.device)
        before = ring[0].index_select(1, ring_slot(at, slots))
        if ring.ndim == 3:
            return torch.cat([before, new], 1)
        # Token after token, as they leave a projection: whole rows are copied.
        before = before.transpose(0, 1).contiguous()
        return torch.cat([before, new.transpose(0, 1)]).transpose(0, 1)
    # A fixed number of launches for any number of sequences.
    rows, at, _ = seg.places()
    start = seg.start_dev.long()[rows]
    held = rows * slots + ring_slot(at, slots)
    fresh = len(seg.start) * slots + seg.cu_q_dev.long()[rows] + at - start
    source = torch.cat([ring.transpose(0, 1).flatten(1, 2), new], 1)
    return source.index_select(1, torch.where(at < start, held, fresh))


def write_prompt(
    state: CacheState, layer: LayerStore, seg: Segments, key: Tensor, value: Tensor, flags: Tensor
) -> Bounds | None:
    """Appends to pages every admitted token that has left the window when this call ends.

    `key`, `value` `[Hkv, Tk, D]` and `flags` `[Hkv, Tk]` are the recent tokens of `seg`. Returns
    what the host knows of the heads' counts afterwards, None if it did not ask.
    """
    call = state.call
    assert call is not None
    before = layer.counts.clone()
    call.before.setdefault(layer.index, before)
    if layer.slides:
        none = [[0] * before.shape[1]] * before.shape[0]
        return Bounds(none, none)
    if max(b - a for a, b in pairwise(seg.cu_k)) <= layer.window:
        return None
    pool, rest = layer.pool, (flags, seg, layer.window)
    heads = Heads(layer.table, layer.counts)
    after, fresh, ranks = state.ops.count_leaving(
        flags, before, seg, layer.window, state.spec.page_size
    )
    held = make_room(state, layer, seg, after, fresh)
    state.ops.write_leaving(pool.pages, heads, key, value, *rest, after, fresh, ranks)
    size, had = state.spec.page_size, call.held[layer.index]
    pairs = zip(chain(*had), chain(*held.most), strict=True)
    summarize(state, layer, before, after, max(-(-n // size) - was // size for was, n in pairs))
    return held


def summarize(
    state: CacheState, layer: LayerStore, before: Tensor, after: Tensor, span: int
) -> None:
    """Recomputes the summaries of pages that hold tokens from index `before` up to `after`.

    They are at most `span` a head. For heads with fewer the last page is done again, so that the
    host need not know; an empty head has the null page, whose summary nobody reads. Few pages a
    head are read at a time where there are many heads.
    """
    if layer.selection.neutral or layer.slides or not span:
        return
    size = state.spec.page_size
    last = (_ceil(after, size) - 1).clamp(min=0)
    page = 2 * size * state.spec.head_dim * layer.ring_k.element_size()
    step = max(SCRATCH // (page * after.numel()), 1)
    for some in torch.arange(span, device=before.device).split(step):
        column = ((before // size)[..., None] + some).minimum(last[..., None]).long()
        held = (after[..., None] - column * size).clamp(1, size)
        refresh_summary(state, layer, layer.table.gather(2, column).flatten(), held.flatten())


def refresh_summary(state: CacheState, layer: LayerStore, ids: Tensor, counts: Tensor) -> None:
    """Computes the summaries of pages `ids` `[N]` holding `counts` `[N]` tokens."""
    keys = state.ops.read_pages(layer.pool.pages, ids)[0]
    valid = torch.arange(keys.shape[1], device=ids.device) < counts[:, None]
    state.ops.write_summary(layer.pool.pages, ids, summary_of(layer, keys, valid))


def summary_of(layer: LayerStore, keys: Tensor, valid: Tensor) -> Tensor:
    """What the selection says of pages: keys `[N, P, D]` and valid `[N, P]` to `[N, S]`."""
    summary = layer.selection.summarize(keys, valid)
    if summary.ndim != 2 or summary.shape[0] != keys.shape[0]:
        raise ValueError(
            f"{type(layer.selection).__name__}.summarize: wanted [{keys.shape[0]}, S], got "
            f"{list(summary.shape)}"
        )
    width = layer.pool.pages.summary.shape[1]  # type: ignore[union-attr]
    return torch.nn.functional.pad(summary, (0, width - summary.shape[1]))


def write_ring(
    state: CacheState, layer: LayerStore, seg: Segments, key: Tensor, value: Tensor, flags: Tensor
) -> None:
    """Puts the last new tokens of each sequence into the ring, keeping what abort needs."""
    call = state.call
    assert call is not None
    ring = (layer.ring_k, layer.ring_v, layer.ring_flags)
    if any(state.lengths) and layer.index not in call.undo:
        call.undo[layer.index] = tuple(t.clone() for t in ring)
    _keep_last(ring, (key, value, flags), seg)


def write_queries(state: CacheState, layer: LayerStore, seg: Segments, query: Tensor) -> None:
    """Remembers the last queries `[Hq, T, D]` of each sequence for an eviction."""
    if layer.queries is None:
        return
    call = state.call
    assert call is not None
    if any(state.lengths) and layer.index in call.undo and len(call.undo[layer.index]) == 3:
        call.undo[layer.index] = (*call.undo[layer.index], layer.queries.clone())
    _keep_last((layer.queries,), (query,), seg)


def _keep_last(rings: tuple[Tensor, ...], news: tuple[Tensor, ...], seg: Segments) -> None:
    """Writes the last new tokens `[H, T, ...]` of each sequence to rings `[B, H, slots, ...]`.

    A token at position p is in slot p % slots.
    """
    slots = rings[0].shape[2]
    if len(seg.start) == 1:
        after, new = seg.start[0] + seg.cu_q[1], min(seg.cu_q[1], slots)
        slot = ring_slot(torch.arange(after - new, after, device=rings[0].device), slots)
        for ring, tokens in zip(rings, news, strict=True):
            ring[0].index_copy_(1, slot, tokens[:, seg.cu_q[1] - new :])
        return
    if seg.cu_q[-1] == 0:
        return
    # A fixed number of launches for any number of sequences.
    cu, start = seg.cu_q_dev.long(), seg.start_dev.long()[:, None]
    first = cu[:-1, None]
    end = start + cu[1:, None] - first
    back = ring_slot(end - 1 - torch.arange(slots, device=start.device), slots)
    at = end - 1 - back  # [B, slots]
    fresh = at >= start
    index = torch.where(fresh, first + at - start, 0)
    for ring, tokens in zip(rings, news, strict=True):
        written = tokens[:, index].transpose(0, 1)
        mask = fresh.view(len(fresh), 1, slots, *[1] * (ring.ndim - 3))
        ring.copy_(torch.where(mask, written, ring))


def write_token(
    state: CacheState,
    layer: LayerStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor | None,
    bits: int,
    lengths: Tensor,
    active: Tensor,
) -> None:
    """Writes a decoded token a sequence: `key`, `value` `[B, Hkv, D]`, `flags` `[B, Hkv]` uint8.

    `bits` are those of every head's flags.
    """
    fused = layer.selection.fused == "quest_select"
    pages = layer.pool.pages
    heads = Heads(layer.table, layer.counts)
    ring = Ring(layer.ring_k, layer.ring_v, layer.ring_flags)
    state.ops.decode_write(
        pages, heads, ring, key, value, flags, lengths, active, layer.window,
        minmax=fused and not layer.slides, bits=bits,
        query=None if layer.queries is None else query, queries=layer.queries,
    )  # fmt: skip
    if not (fused or layer.selection.neutral or layer.slides):
        # The page that may have been touched is the last one of each head.
        size = state.spec.page_size
        last = ((layer.counts - 1) // size).clamp(min=0).long()
        ids = layer.table.gather(2, last[..., None])[..., 0]
        held = (layer.counts - last.int() * size).flatten()
        refresh_summary(state, layer, ids.flatten(), held)


def _ceil(counts: Tensor, size: int) -> Tensor:
    return (counts + size - 1) // size
