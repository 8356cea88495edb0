"""A layer of a decode call: for each column decide, write, choose pages, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..admission import Write
from ..errors import UnsupportedError
from ..ops import Heads
from ..store.layer import LayerStore
from ..store.moments import keep_columns, put
from ..store.numbers import counts_queries
from ..store.state import CacheState, Call
from ..store.summaries import refresh_last
from ._checks import check_asked, check_input
from .decide import alike, decide, number
from .select import select
from .settle import settle_step


def decode(
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
    """Attention of one or more columns, one after the other; see `CachePipeline.attend`."""
    columns, sizes = call.columns, layer.sizes
    check_input(layer, "query", query, (state.batch, sizes.heads, columns, sizes.head_dim))
    kv = state.batch, sizes.kv_heads, columns
    check_input(layer, "key", key, (*kv, sizes.head_dim))
    check_input(layer, "value", value, (*kv, sizes.value_dim))
    check_asked(layer, (state.batch, columns), query_pre, hidden)
    long = columns > max(state.spec.rollback, 1)
    if columns > state.spec.rollback and layer.index not in call.undo:
        call.undo[layer.index] = layer.snapshot()
    if layer.query_ring is not None and query_pre is not None and long:
        assert call.valid is not None
        keep_columns(state, layer, query_pre, call.valid)
    if columns == 1:
        at, on = _column(state, call, layer, 0)
        new = key.select(2, 0), value.select(2, 0)
        write = None
        if alike(layer) is None:
            write = _write(state, layer, new, at, 0, key_pre, hidden)
        _remember(layer, query_pre, hidden, 0, at, on, long=long)
        return _token(state, layer, query.select(2, 0), new, write, at, on).unsqueeze(2)
    outs = []
    for column in range(columns):
        at, on = _column(state, call, layer, column)
        new = key.select(2, column), value.select(2, column)
        write = _write(state, layer, new, at, column, key_pre, hidden)
        _remember(layer, query_pre, hidden, column, at, on, long=long)
        outs.append(_token(state, layer, query.select(2, column), new, write, at, on))
        if columns > state.spec.rollback and counts_queries(layer):
            settle_step(state, layer, at, on)
        if sizes.shared:
            call.columnwise.setdefault(layer.index, []).append(layer.counts.clone())
    return torch.stack(outs, 2)


def _write(
    state: CacheState, layer: LayerStore, new: tuple[Tensor, Tensor], at: Tensor, column: int,
    key_pre: Tensor | None, hidden: Tensor | None,
) -> Write:  # fmt: skip
    """What policies see of a column, whose keys and values are `new`."""
    return Write(
        new[0].transpose(0, 1),
        new[1].transpose(0, 1),
        at,
        state.on(layer).cu_one,
        layer.index,
        state.spec.head_ids,
        key_pre=None if key_pre is None else key_pre.select(2, column).transpose(0, 1),
        hidden=None if hidden is None else hidden[:, column],
    )


def _remember(
    layer: LayerStore, query_pre: Tensor | None, hidden: Tensor | None, column: int, at: Tensor,
    on: Tensor, *, long: bool,
) -> None:  # fmt: skip
    """Puts into rings what an eviction asked for of a column."""
    if layer.query_ring is not None and query_pre is not None and not long:
        put(layer.query_ring, query_pre[:, :, column], at, on)
    if layer.hidden is not None and hidden is not None:
        put(layer.hidden, hidden[:, None, column].to(layer.hidden.dtype), at, on)


def read_decoded(
    state: CacheState, call: Call, layer: LayerStore, query: Tensor, sinks: Tensor | None
) -> Tensor:
    """Attention of another query over what a layer read; see `CachePipeline.attend_shared`.

    A choice of pages goes by summaries, of which only those after the last column are left.
    """
    asked = min(query.shape[2], call.columns)  # the last ones
    shape = state.batch, query.shape[1], asked, layer.sizes.head_dim
    check_input(layer, "query", query, shape)
    if call.columns > 1 and not (layer.selection.neutral or layer.slides):
        raise UnsupportedError(
            f"{type(layer.selection).__name__}: layers share the keys of layer {layer.index}, and "
            "cannot choose pages for several tokens of one decode call; decode token by token, or "
            "read a question as a prompt (question='prompt')"
        )
    outs = []
    for place in range(asked):
        column = call.columns - asked + place
        at, on = _column(state, call, layer, column)
        heads = layer.heads
        if call.columns > 1:
            heads = heads._replace(counts=call.columnwise[layer.index][column])
        token = query[:, :, place]
        outs.append(
            _attention(state, layer, heads, token, at, on, sinks, select(state, layer, token))
        )
    return outs[0][:, :, None] if asked == 1 else torch.stack(outs, 2)


def _column(state: CacheState, call: Call, layer: LayerStore, column: int) -> tuple[Tensor, Tensor]:
    """Tokens before a column and the sequences for which it is a real token, `[B]` each."""
    own = state.on(layer)
    lengths, active = own.lengths, own.active
    if call.valid is None:
        return lengths, active
    key = "columns", layer.device
    if key not in call.shared:
        real = call.valid.to(layer.device) & active[:, None]
        before = lengths[:, None] + real.cumsum(1) - real.long()
        # Each in memory of its own, whose start is aligned as kernels were compiled for.
        call.shared[key] = [
            (at.clone(), on.clone())
            for at, on in zip(before.unbind(1), real.unbind(1), strict=True)
        ]
    found: tuple[Tensor, Tensor] = call.shared[key][column]
    return found


def _attention(
    state: CacheState, layer: LayerStore, heads: Heads, query: Tensor, lengths: Tensor,
    active: Tensor, sinks: Tensor | None, selected: Tensor | None,
) -> Tensor:  # fmt: skip
    sizes = layer.sizes
    return state.ops.paged_decode(
        query, layer.pool.pages, heads, layer.ring, lengths, active, layer.window, sizes.scale,
        selected=selected, softcap=sizes.softcap, sinks=sinks, chunk=sizes.chunk,
    )  # fmt: skip


def _token(
    state: CacheState, layer: LayerStore, query: Tensor, new: tuple[Tensor, Tensor],
    write: Write | None, lengths: Tensor, active: Tensor,
) -> Tensor:  # fmt: skip
    """Attention `[B, Hq, D]` of one token a sequence, which is stored where `active` `[B]`.

    `new` are its key and value, `[B, Hkv, D]` each; `write` is None where no policy looks at it.
    """
    decided, bits = (None, alike(layer) or 0) if write is None else decide(layer, write)
    if layer.numbers is not None:
        assert write is not None
        given = number(layer, write)
        state.ops.write_number(
            layer.numbers, layer.counts, layer.ring.flags,
            None if given is None else given.T, lengths, active, layer.window,
        )  # fmt: skip
    neutral = layer.slides or layer.selection.neutral
    minmax = not neutral and layer.selection.extends_minmax
    state.ops.decode_write(
        layer.pool.pages, layer.heads, layer.ring,
        *new, None if decided is None else decided.transpose(0, 1), lengths, active, layer.window,
        minmax=minmax, bits=bits,
        query=None if layer.queries is None else query, queries=layer.queries,
    )  # fmt: skip
    if not (minmax or neutral):
        refresh_last(state, layer)
    layer.selected = None if neutral else select(state, layer, query)
    return _attention(
        state, layer, layer.heads, query, lengths, active, layer.sinks, layer.selected
    )
