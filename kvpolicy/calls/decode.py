"""A layer of a decode call: for each column decide, write, choose pages, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..admission import Write
from ..store.layer import LayerStore
from ..store.state import CacheState, Call
from ..store.summaries import refresh_last
from ._checks import check_input
from .decide import decide
from .select import select


def decode(
    state: CacheState,
    call: Call,
    layer: LayerStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pre: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """Attention of one or more columns, one after the other; see `CachePipeline.attend`."""
    columns, sizes = call.columns, layer.sizes
    check_input(layer, "query", query, (state.batch, sizes.heads, columns, sizes.head_dim))
    for name, tensor in (("key", key), ("value", value)):
        check_input(layer, name, tensor, (state.batch, sizes.kv_heads, columns, sizes.head_dim))
    if columns > state.spec.rollback and layer.index not in call.undo:
        call.undo[layer.index] = layer.snapshot()
    lengths, active = state.on(layer).lengths, state.on(layer).active
    outs = []
    for column in range(columns):
        at, on = lengths, active
        if call.valid is not None:
            valid = call.valid.to(layer.device)
            at = lengths + (valid[:, :column] & active[:, None]).sum(1)
            on = active & valid[:, column]
        write = Write(
            key[:, :, column].transpose(0, 1),
            value[:, :, column].transpose(0, 1),
            at,
            state.on(layer).cu_one,
            layer.index,
            state.spec.head_ids,
            key_pre=None if key_pre is None else key_pre[:, :, column].transpose(0, 1),
            hidden=None if hidden is None else hidden[:, column],
        )
        outs.append(_token(state, layer, query[:, :, column], write, on))
    return outs[0][:, :, None] if columns == 1 else torch.stack(outs, 2)


def _token(
    state: CacheState, layer: LayerStore, query: Tensor, write: Write, active: Tensor
) -> Tensor:
    """Attention `[B, Hq, D]` of one token a sequence, which is stored where `active` `[B]`."""
    decided, bits = decide(layer, write)
    lengths, minmax = write.positions, layer.selection.extends_minmax and not layer.slides
    state.ops.decode_write(
        layer.pool.pages, layer.heads, layer.ring,
        write.key.transpose(0, 1), write.value.transpose(0, 1),
        None if decided is None else decided.transpose(0, 1), lengths, active, layer.window,
        minmax=minmax, bits=bits,
        query=None if layer.queries is None else query, queries=layer.queries,
    )  # fmt: skip
    if not (minmax or layer.selection.neutral or layer.slides):
        refresh_last(state, layer)
    layer.selected = select(state, layer, query)
    return state.ops.paged_decode(
        query, layer.pool.pages, layer.heads, layer.ring, lengths, active, layer.window,
        layer.sizes.scale, selected=layer.selected,
    )  # fmt: skip
