"""A layer of a prompt call: decide, write to pages, attend, keep the last tokens."""

from __future__ import annotations

from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from ..admission import Write
from ..errors import PhaseError
from ..ops import Bounds, Ring, Segments
from ..store.layer import LayerStore
from ..store.moments import keep_prompt
from ..store.numbers import promote
from ..store.ring import keep_last
from ..store.state import CacheState, Call, Told
from ..store.summaries import summarize
from ._checks import check_asked, check_input
from .decide import decide_prompt, number
from .prompt_pages import make_room
from .settle import settle_prompt, settle_ring
from .tiles import choose_tiles, count_blocks


def prompt(
    state: CacheState,
    call: Call,
    layer: LayerStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pre: Tensor | None,
    hidden: Tensor | None,
    query_pre: Tensor | None,
) -> Tensor:
    """Attention of new tokens, packed over sequences; see `CachePipeline.attend`."""
    tokens, sizes = sum(call.added), layer.sizes
    check_input(layer, "query", query, (sizes.heads, tokens, sizes.head_dim))
    check_input(layer, "key", key, (sizes.kv_heads, tokens, sizes.head_dim))
    check_input(layer, "value", value, (sizes.kv_heads, tokens, sizes.value_dim))
    check_asked(layer, (tokens,), query_pre, hidden)
    if layer.index in call.before or layer.index in call.undo:
        raise PhaseError(
            f"attend: layer {layer.index} failed in this call; abort it and begin again"
        )
    seg = segments_of(state, call, layer)
    if tokens == 0:
        return query.new_empty(sizes.heads, 0, sizes.value_dim)
    write = Write(
        key, value, _positions(call, seg), seg.cu_q_dev, layer.index, state.spec.head_ids,
        key_pre=key_pre, hidden=hidden,
    )  # fmt: skip
    flags = decide_prompt(layer, write, call.shared)
    given = number(layer, write)
    begun = any(state.lengths)
    if begun:  # the ring's own tokens follow
        others = tuple(x.clone() for x in layer.beside_ring)
    settle_ring(state, call, layer)
    (k, v, f), held = state.ops.advance_ring(layer.ring, key, value, flags, seg, undo=begun)
    if held is not None:
        call.undo[layer.index] = *held, *others
    bounds = write_prompt(state, call, layer, seg, k, v, f)
    # Dense kernels take one sequence after the other, which pays for whole prompts only.
    alone = state.batch == 1 or not begun
    whole = not any(row.evicted_at for row in state.sequences) and _holds_all(state, call, layer)
    dense = layer.admission.neutral and not layer.slides and whole and alone
    told = Told(seg, k, v, f, bounds, dense)
    if sizes.shared:
        call.told[layer.index] = told
    out = _attention(state, call, layer, query, layer.sinks, told)
    if layer.numbers is not None:
        moved = promote(layer, given, f, call.before[layer.index], seg, call.shared)
        settle_prompt(state, call, layer, seg, Ring(k, v, f), query, moved)
    if layer.queries is not None:
        keep_last(layer.queries, query, seg, call.shared)
    if layer.query_ring is not None and query_pre is not None:
        keep_prompt(state, layer, query_pre, seg.cu_q[1:])
    if layer.hidden is not None and hidden is not None:
        keep_last(layer.hidden, hidden[None].to(layer.hidden.dtype), seg, call.shared)
    return out


def read_prompt(
    state: CacheState,
    call: Call,
    layer: LayerStore,
    query: Tensor,
    sinks: Tensor | None,
    last: tuple[int, ...] | None,
) -> Tensor:
    """Attention of another query over what a layer read; see `CachePipeline.attend_shared`."""
    sizes, last = layer.sizes, call.added if last is None else last
    check_input(layer, "query", query, (query.shape[0], sum(last), sizes.head_dim))
    if not sum(last):
        return query.new_empty(query.shape[0], 0, sizes.value_dim)
    told = call.told[layer.index]
    if last != call.added:
        told = told._replace(segments=_last(told.segments, last))
    return _attention(state, call, layer, query, sinks, told)


def _last(seg: Segments, last: tuple[int, ...]) -> Segments:
    """Segments of the `last` tokens of each sequence alone."""
    cu_q = (0, *accumulate(last))
    spans = zip(seg.start, pairwise(seg.cu_q), last, strict=True)
    start = tuple(at + end - begin - n for at, (begin, end), n in spans)
    on = [torch.tensor(n, dtype=torch.int32, device=seg.cu_q_dev.device) for n in (cu_q, start)]
    return seg._replace(cu_q=cu_q, start=start, cu_q_dev=on[0], start_dev=on[1])


def _attention(
    state: CacheState, call: Call, layer: LayerStore, query: Tensor, sinks: Tensor | None,
    told: Told,
) -> Tensor:  # fmt: skip
    pages, sizes, seg = layer.pool.pages, layer.sizes, told.segments
    reads = choose_tiles(state, layer, query, told)
    if reads is not None:
        found = count_blocks(reads, told)
        call.chosen[layer.index] = found + call.chosen.get(layer.index, 0)
        return state.ops.selected_prefill(
            query, told.key, told.value, seg, pages, layer.heads, layer.window, sizes.scale,
            reads, told.bounds, softcap=sizes.softcap, sinks=sinks,
        )  # fmt: skip
    if told.dense:
        return state.ops.dense_prefill(
            query, told.key, told.value, seg, pages, layer.table, sizes.scale,
            softcap=sizes.softcap, sinks=sinks,
        )  # fmt: skip
    return state.ops.prefill_attention(
        query, told.key, told.value, told.flags, seg, pages, layer.heads, layer.window,
        sizes.scale, told.bounds, softcap=sizes.softcap, sinks=sinks, chunk=sizes.chunk,
    )  # fmt: skip


def _holds_all(state: CacheState, call: Call, layer: LayerStore) -> bool:
    """Whether all earlier tokens are stored; generated ones may have been forgotten."""
    held = call.held.get(layer.index)  # unknown where all fit in the window
    return held is None or all(
        n == max(length - layer.window, 0)
        for length, heads in zip(state.lengths, held, strict=True)
        for n in heads
    )


def segments_of(state: CacheState, call: Call, layer: LayerStore) -> Segments:
    """The call's segments; a sequence's keys are its ring's tokens and the new ones.

    Layers with one window on one device share them.
    """
    window, device = layer.window if any(state.lengths) else 0, layer.device
    if (window, device) not in call.segments:
        cu_q, cu_k = [0], [0]
        for length, new in zip(state.lengths, call.added, strict=True):
            cu_q.append(cu_q[-1] + new)
            cu_k.append(cu_k[-1] + (min(length, window) + new if new else 0))
        numbers = [cu_q, cu_k, state.lengths]
        on = [torch.tensor(n, dtype=torch.int32, device=device) for n in numbers]
        call.segments[window, device] = Segments(
            tuple(cu_q), tuple(cu_k), tuple(state.lengths), *on
        )
    return call.segments[window, device]


def _positions(call: Call, seg: Segments) -> Tensor:
    """Positions `[T]` int64 of the call's new tokens, once for all layers on a device."""
    key = "positions", seg.cu_q_dev.device
    if key not in call.shared:
        spans = zip(seg.start, call.added, strict=True)
        each = [torch.arange(at, at + n, device=key[1]) for at, n in spans]
        call.shared[key] = each[0] if len(each) == 1 else torch.cat(each)
    found: Tensor = call.shared[key]
    return found


def _counts_before(state: CacheState, call: Call, layer: LayerStore) -> Tensor:
    """The layer's counts `[B, Hkv]` before the call; those of all its pool's layers are copied."""
    key = "counts", layer.pool
    if key not in call.shared:
        layers = [x for x in state.layers if x.pool is layer.pool]
        call.shared[key] = dict(
            zip((x.index for x in layers), torch.stack([x.counts for x in layers]), strict=True)
        )
    found: Tensor = call.shared[key][layer.index]
    return found


def write_prompt(
    state: CacheState,
    call: Call,
    layer: LayerStore,
    seg: Segments,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
) -> Bounds | None:
    """Appends to pages every admitted token that has left the window when this call ends.

    `key`, `value` `[Hkv, Tk, D]` and `flags` `[Hkv, Tk]` are the recent tokens of `seg`. Returns
    what the host knows of the heads' counts afterwards, None if it did not ask.
    """
    before = call.before[layer.index] = _counts_before(state, call, layer)
    if layer.slides:
        none = [[0] * before.shape[1]] * before.shape[0]
        return Bounds(none, none)
    if max(b - a for a, b in pairwise(seg.cu_k)) <= layer.window:
        return None
    size = layer.pool.page_size
    after, fresh, ranks = state.ops.count_leaving(flags, before, seg, layer.window, size)
    bounds = make_room(state, call, layer, seg, after, fresh)
    state.ops.write_leaving(
        layer.pool.pages, layer.heads, key, value, flags, seg, layer.window, after, fresh, ranks
    )
    pairs = zip(chain(*call.held[layer.index]), chain(*bounds.most), strict=True)
    summarize(state, layer, before, max(-(-n // size) - was // size for was, n in pairs))
    return bounds
