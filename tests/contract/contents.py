"""What a cache holds, read back from its buffers."""

from __future__ import annotations

import torch

from kvpolicy.types import ADMITTED, MARKED, POSITION_MASK


def contents(state, layer, row):
    """What each head of a sequence holds: page contents with summaries, visible ring, queries."""
    store, size = state.layers[layer], state.spec.page_size
    length = state.lengths[row]
    near = torch.arange(max(length - store.window, 0), length) % store.ring_k.shape[2]
    heads = []
    for h in range(state.spec.kv_heads):
        count = int(store.counts[row, h])
        ids = store.table[row, h, : -(-count // size)]
        k, v, meta = state.ops.read_pages(store.pool.pages, ids)
        flags, meta = store.ring_flags[row, h, near], meta.flatten()[:count]
        head = {
            "at": meta & POSITION_MASK,
            "mark": meta > POSITION_MASK,
            "k": k.flatten(0, 1)[:count],
            "v": v.flatten(0, 1)[:count],
            "ring_k": store.ring_k[row, h, near],
            "ring_v": store.ring_v[row, h, near],
            "admitted": (flags & ADMITTED) > 0,
            "marked": (flags & MARKED) > 0,
        }
        if store.pool.summary is not None and not store.selection.neutral and not store.slides:
            head["summary"] = state.ops.read_summary(store.pool.pages, ids)
        if store.queries is not None:
            last = torch.arange(max(length - store.eviction.queries, 0), length)
            head["queries"] = store.queries[row][:, last % store.queries.shape[2]]
        heads.append(head)
    return heads


def digest(state):
    """Everything that decides what comes next, as plain lists; unused memory left out."""
    rows = range(state.batch)
    tensors = [
        [{n: t.tolist() for n, t in head.items()} for head in contents(state, layer, row)]
        for layer in range(state.spec.layers)
        for row in rows
    ]
    counters = [(x.counts.tolist(), x.evicted.tolist()) for x in state.layers]
    on_device = [x.tolist() for d in (state.lengths_on, state.active_on) for x in d.values()]
    hosts = (state.lengths, state.active, state.floor, state.checked, state.pending)
    return repr((tensors, counters, on_device, hosts))
