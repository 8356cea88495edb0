"""A layer of a prompt call: decide, write to pages, attend, keep the last tokens."""

from __future__ import annotations

from itertools import chain, pairwise

import torch
from torch import Tensor

from ..admission import Write
from ..errors import PhaseError
from ..ops import Bounds, Segments
from ..store.layer import LayerStore
from ..store.ring import keep_last, recent
from ..store.state import CacheState, Call
from ..store.summaries import summarize
from ._checks import check_input
from .decide import decide_prompt
from .prompt_pages import make_room


def prompt(
    state: CacheState,
    call: Call,
    layer: LayerStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pre: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """Attention of new tokens, packed over sequences; see `CachePipeline.attend`."""
    tokens, sizes = sum(call.added), layer.sizes
    check_input(layer, "query", query, (sizes.heads, tokens, sizes.head_dim))
    for name, tensor in (("key", key), ("value", value)):
        check_input(layer, name, tensor, (sizes.kv_heads, tokens, sizes.head_dim))
    if layer.index in call.before:
        raise PhaseError(
            f"attend: layer {layer.index} failed in this call; abort it and begin again"
        )
    seg = segments_of(state, call, layer)
    if tokens == 0:
        return query.clone()
    positions = torch.cat(
        [
            torch.arange(start, start + n, device=key.device)
            for start, n in zip(seg.start, call.added, strict=True)
        ]
    )
    write = Write(
        key, value, positions, seg.cu_q_dev, layer.index, state.spec.head_ids,
        key_pre=key_pre, hidden=hidden,
    )  # fmt: skip
    flags = decide_prompt(layer, write)
    k, v, f = (recent(r, x, seg) for r, x in zip(layer.ring, (key, value, flags), strict=True))
    bounds = write_prompt(state, call, layer, seg, k, v, f)
    pages, scale, begun = layer.pool.pages, sizes.scale, any(state.lengths)
    # Dense kernels take one sequence after the other, which pays for whole prompts only.
    alone = state.batch == 1 or not begun
    whole = not any(row.evicted_at for row in state.sequences) and _holds_all(state, call, layer)
    if layer.admission.neutral and not layer.slides and whole and alone:
        out = state.ops.dense_prefill(query, k, v, seg, pages, layer.table, scale)
    else:
        out = state.ops.prefill_attention(
            query, k, v, f, seg, pages, layer.heads, layer.window, scale, bounds
        )
    if begun and layer.index not in call.undo:
        call.undo[layer.index] = layer.snapshot()
    keep_last(layer.ring, (key, value, flags), seg)
    if layer.queries is not None:
        keep_last((layer.queries,), (query,), seg)
    return out


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
    before = layer.counts.clone()
    call.before.setdefault(layer.index, before)
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
    summarize(state, layer, before, after, max(-(-n // size) - was // size for was, n in pairs))
    return bounds
