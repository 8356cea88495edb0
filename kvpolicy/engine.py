"""What happens in a call: decide, write, choose, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from . import caps
from ._inputs import check_input
from .deciding import decide, decide_prompt
from .errors import PhaseError
from .ops import Heads, Ring
from .selection._base import combine_group
from .store.dual_cache import (
    layer_segments,
    recent,
    write_prompt,
    write_queries,
    write_ring,
    write_token,
)
from .store.layer import LayerStore
from .store.state import CacheState, Call
from .types import Write


def open_call(
    state: CacheState, lengths: tuple[int, ...], phase: str, valid: Tensor | None
) -> None:
    """Reserves tables and, for decoding, pages; then marks the call as open."""
    if phase == "decode":
        lengths = tuple(n if on else 0 for n, on in zip(lengths, state.active, strict=True))
    state.reserve(max(a + b for a, b in zip(state.lengths, lengths, strict=True)))
    steps = max(lengths, default=0)
    if phase == "prompt":
        caps.before_prompt(state, lengths)
        for pool in state.pools.values():
            pool.holders[state] = 0
            pool.unseen.forget()
        state.steps_reserved = 0
    elif state.steps_reserved < steps:
        caps.reserve(state, steps, max(steps, state.spec.interval))
    state.call = Call(phase=phase, added=lengths, valid=valid)


def close_call(state: CacheState) -> None:
    """Makes lengths current on host and devices."""
    call = state.call
    assert call is not None
    if call.phase == "prompt":
        for pool in state.pools.values():
            pool.unseen.settle()
            pool.unseen.forget()
    state.call = None
    state.lengths = [a + b for a, b in zip(state.lengths, call.added, strict=True)]
    if call.phase == "prompt":
        state.sync_devices()
        return
    state.steps_reserved -= max(call.added, default=0)
    for device, lengths in state.lengths_on.items():
        active = state.active_on[device]
        if call.valid is None:
            lengths.add_(active)
        else:
            lengths.add_((call.valid.to(device) & active[:, None]).sum(1))


def prompt(
    state: CacheState,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pre: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """A layer of a prompt call; see `CachePipeline.attend`."""
    layer, call = state.layers[index], state.call
    assert call is not None
    tokens = sum(call.added)
    check_input(state, index, "query", query, (state.spec.heads, tokens, state.spec.head_dim))
    for name, tensor in (("key", key), ("value", value)):
        check_input(state, index, name, tensor, (state.spec.kv_heads, tokens, state.spec.head_dim))
    if index in call.before:
        raise PhaseError(f"attend: layer {index} failed in this call; abort it and begin again")
    seg = layer_segments(state, layer)
    if tokens == 0:
        return query.clone()
    positions = torch.cat(
        [
            torch.arange(start, start + n, device=key.device)
            for start, n in zip(seg.start, call.added, strict=True)
        ]
    )
    write = Write(
        key, value, positions, seg.cu_q_dev, index, _heads(state), key_pre=key_pre, hidden=hidden
    )
    flags = decide_prompt(layer, write)
    k = recent(layer, seg, key, layer.ring_k)
    v = recent(layer, seg, value, layer.ring_v)
    f = recent(layer, seg, flags, layer.ring_flags)
    held = write_prompt(state, layer, seg, k, v, f)
    scale, pages = state.spec.softmax_scale, layer.pool.pages
    # Dense kernels take one sequence after the other, which pays for whole prompts only.
    alone = state.batch == 1 or not any(state.lengths)
    if layer.admission.neutral and not layer.slides and not any(state.floor) and alone:
        out = state.ops.dense_prefill(query, k, v, seg, pages, layer.table, scale)
    else:
        heads = Heads(layer.table, layer.counts)
        out = state.ops.prefill_attention(
            query, k, v, f, seg, pages, heads, layer.window, scale, held
        )
    write_ring(state, layer, seg, key, value, flags)
    write_queries(state, layer, seg, query)
    return out


def decode(
    state: CacheState,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pre: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """A layer of a decode call, one column after the other; see `CachePipeline.attend`."""
    layer, call, spec = state.layers[index], state.call, state.spec
    assert call is not None
    columns = 1 if call.valid is None else call.valid.shape[1]
    check_input(state, index, "query", query, (state.batch, spec.heads, columns, spec.head_dim))
    for name, tensor in (("key", key), ("value", value)):
        check_input(
            state, index, name, tensor, (state.batch, spec.kv_heads, columns, spec.head_dim)
        )
    device = layer.ring_k.device
    lengths, active = state.lengths_on[device], state.active_on[device]
    if columns > spec.rollback and index not in call.undo:
        saved = [layer.ring_k, layer.ring_v, layer.ring_flags]
        saved += [] if layer.queries is None else [layer.queries]
        call.undo[index] = tuple(t.clone() for t in saved)
    outs = []
    for column in range(columns):
        at, on = lengths, active
        if call.valid is not None:
            valid = call.valid.to(device)
            at = lengths + (valid[:, :column] & active[:, None]).sum(1)
            on = active & valid[:, column]
        outs.append(
            _decode_token(
                state,
                layer,
                query[:, :, column],
                key[:, :, column],
                value[:, :, column],
                None if key_pre is None else key_pre[:, :, column],
                None if hidden is None else hidden[:, column],
                at,
                on,
            )
        )
    return outs[0][:, :, None] if columns == 1 else torch.stack(outs, 2)


def _decode_token(
    state: CacheState,
    layer: LayerStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pre: Tensor | None,
    hidden: Tensor | None,
    lengths: Tensor,
    active: Tensor,
) -> Tensor:
    write = Write(
        key.transpose(0, 1),
        value.transpose(0, 1),
        lengths,
        state.cu_one[key.device],
        layer.index,
        _heads(state),
        key_pre=None if key_pre is None else key_pre.transpose(0, 1),
        hidden=hidden,
    )
    decided, bits = decide(layer, write)
    flags = None if decided is None else decided.transpose(0, 1)
    write_token(state, layer, query, key, value, flags, bits, lengths, active)
    layer.selected = select(state, layer, query)
    return state.ops.paged_decode(
        query,
        layer.pool.pages,
        Heads(layer.table, layer.counts),
        Ring(layer.ring_k, layer.ring_v, layer.ring_flags),
        lengths,
        active,
        layer.window,
        state.spec.softmax_scale,
        selected=layer.selected,
    )


def select(state: CacheState, layer: LayerStore, query: Tensor) -> Tensor | None:
    """The pages `[B, Hs, K]` that queries `[B, Hq, D]` read, or None for all."""
    policy = layer.selection
    if policy.neutral or layer.slides:
        return None
    size, pages = state.spec.page_size, layer.pool.pages
    budget = min(policy.pages(layer.window, size), layer.table.shape[2])
    if policy.fused is not None:
        return getattr(state.ops, policy.fused)(
            pages, Heads(layer.table, layer.counts), query, budget, policy.group, policy.first,
            policy.last,
        )  # fmt: skip
    batch, heads, width = layer.table.shape
    column = torch.arange(width, device=query.device)
    held = (layer.counts[..., None] - column * size).clamp(0, size)
    summary = state.ops.read_summary(pages, layer.table)
    grouped = query.view(batch, heads, -1, query.shape[-1])
    scores = policy.score(grouped, summary, held)
    wanted = (batch, heads, grouped.shape[2], width)
    if scores.shape != wanted:
        raise ValueError(
            f"{type(policy).__name__}.score: wanted {list(wanted)}, got {list(scores.shape)}"
        )
    scores = combine_group(scores, policy.group)
    return state.ops.top_pages(scores, layer.counts, size, budget, policy.first, policy.last)


def _heads(state: CacheState) -> range:
    return range(state.spec.head_offset, state.spec.head_offset + state.spec.kv_heads)
