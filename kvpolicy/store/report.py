"""What a cache holds, in bytes and in tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from ..ops import ADMITTED, ring_slot

if TYPE_CHECKING:
    from .layer import LayerStore
    from .state import CacheState


@attrs.frozen(kw_only=True)
class Report:
    """What took effect and what it costs.

    Bytes are those of the storages: `pages` hold tokens, `reserved` are allocated and hold none,
    `ring` is the local window with its rollback slots, `positions`, `summaries` belong to pages in
    use, `tables` are page tables, counters and free stack, `queries` the observation windows.
    Lists are `[layer][head]`, summed or averaged over sequences. `admitted` is the fraction of seen
    tokens admitted (None: the layer only slides, policies do not apply), `stored` the mean tokens
    held per sequence with the window, `evicted` the tokens dropped, `read` the mean tokens that the
    last decoded token read. `overshoot` is the most tokens by which a head came to exceed
    `max_tokens` during a prompt call, `cap_evicted` the tokens dropped because a cap was reached.
    """

    pages: int
    reserved: int
    ring: int
    positions: int
    summaries: int
    tables: int
    queries: int
    tokens: int
    admitted: list[list[float] | None]
    stored: list[list[float]]
    evicted: list[list[int]]
    read: list[list[float]]
    sliding_layers: list[int]
    shared_pages: int
    overshoot: int
    cap_evicted: int

    @property
    def total(self) -> int:
        """All bytes."""
        return (
            self.pages
            + self.reserved
            + self.ring
            + self.positions
            + self.summaries
            + self.tables
            + self.queries
        )

    @property
    def kv(self) -> int:
        """Bytes of keys and values: pages and ring."""
        return self.pages + self.ring

    @property
    def mean_admitted(self) -> float:
        """Admitted fraction over all heads of the layers that policies manage."""
        values = [x for layer in self.admitted if layer is not None for x in layer]
        return sum(values) / len(values) if values else 1.0

    @property
    def mean_read(self) -> float:
        """Tokens per head that the last decoded token read."""
        values = [x for layer in self.read for x in layer]
        return sum(values) / len(values)


def report(state: CacheState) -> Report:
    """Measures a cache; reads the device."""
    pages = reserved = positions = summaries = shared = tables = 0
    for pool in state.pools.values():
        used = pool.used
        kv = meta = summary = 0
        for k, v, m, s in pool.extents:
            kv += k.untyped_storage().nbytes() + v.untyped_storage().nbytes()
            meta += m.untyped_storage().nbytes()
            summary += 0 if s is None else s.untyped_storage().nbytes()
        capacity = pool.capacity
        pages += kv * used // capacity
        positions += meta * used // capacity
        summaries += summary * used // capacity
        reserved += sum(x - x * used // capacity for x in (kv, meta, summary))
        tables += _bytes(pool.free, pool.refs, pool.top, pool.slabs)
        shared += int((pool.refs > 1).sum())
    ring = queries = 0
    for layer in state.layers:
        ring += _bytes(layer.ring_k, layer.ring_v, layer.ring_flags)
        tables += _bytes(layer.table, layer.counts, layer.evicted, layer.selected)
        queries += _bytes(layer.queries)
    for values in (state.lengths_on, state.active_on, state.cu_one):
        tables += _bytes(*values.values())
    return Report(
        pages=pages,
        reserved=reserved,
        ring=ring,
        positions=positions,
        summaries=summaries,
        tables=tables,
        queries=queries,
        tokens=sum(state.lengths),
        admitted=[None if x.slides else _admitted(state, x) for x in state.layers],
        stored=[(_stored(state, x) / state.batch).tolist() for x in state.layers],
        evicted=[x.evicted.sum(0).tolist() for x in state.layers],
        read=[_read(state, x) for x in state.layers],
        sliding_layers=[x.index for x in state.layers if x.slides],
        shared_pages=shared,
        overshoot=max(state.overshoot),
        cap_evicted=sum(state.cap_evicted),
    )


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def _near(state: CacheState, layer: LayerStore) -> torch.Tensor:
    """Tokens in each sequence's window, `[B]`."""
    return torch.tensor([min(n, layer.window) for n in state.lengths])


def _stored(state: CacheState, layer: LayerStore) -> torch.Tensor:
    return (layer.counts.cpu() + _near(state, layer)[:, None]).sum(0).double()


def _admitted(state: CacheState, layer: LayerStore) -> list[float]:
    slots = layer.ring_flags.shape[2]
    lengths = torch.tensor(state.lengths)[:, None]
    back = ring_slot(lengths - 1 - torch.arange(slots), slots)
    near = ((back < layer.window) & (back < lengths))[:, None]
    flagged = ((layer.ring_flags.cpu() & ADMITTED) > 0) & near
    total = layer.counts.cpu() + layer.evicted.cpu() + flagged.sum(-1)
    return (total.sum(0) / max(sum(state.lengths), 1)).tolist()


def _read(state: CacheState, layer: LayerStore) -> list[float]:
    near = _near(state, layer)[:, None]
    if layer.selected is None:
        return (_stored(state, layer) / state.batch).tolist()
    size = state.spec.page_size
    selected = layer.selected.cpu()
    counts = layer.counts.cpu().repeat_interleave(selected.shape[1] // layer.counts.shape[1], 1)
    held = (counts[..., None] - selected * size).clamp(max=size)
    tokens = torch.where(selected >= 0, held, 0).sum(-1) + near
    return tokens.double().mean(0).tolist()
