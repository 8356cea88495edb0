"""What a cache holds, in bytes and in tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
import torch

from ..budget import budget_of
from ..ops import ADMITTED, ring_positions
from ..selection import PerPhase, Selection
from .layer import LayerStore
from .report_table import SLOTS, report_table
from .sizes import (
    dense_bytes,
    number_bytes,
    query_bytes,
    ring_bytes,
    statistics_bytes,
    storage_bytes,
    table_bytes,
)
from .state import CacheState


@attrs.frozen(kw_only=True)
class Report:
    """What took effect and what it costs; `print` shows a table, a notebook too.

    Bytes are those of the storages: `pages` hold tokens, `reserved` are allocated and hold none,
    `ring` is the local window with its rollback slots, `positions`, `summaries` belong to pages in
    use, `tables` are page tables, counters and free stack, `queries` the observation windows,
    `numbers` those of tokens that an eviction asked for, `statistics` what evictions hold of
    queries before RoPE and of attention inputs, `states` recurrent and convolutional states of a
    model's layers without attention.
    `dense` are keys and values of all tokens seen (in layers that slide: of their windows), which
    is what an ordinary cache holds. `sequences` counts those of the cache, `tokens` the real
    tokens that all of them have seen, `shared_pages` the pages that more than one head holds, as
    forks do. `policies` names what acts on which layers, by slot; neutral policies and layers that
    slide, `sliding_layers`, are left out.
    Lists are `[layer][head]`, summed or averaged over sequences. `admitted` is the fraction of seen
    tokens admitted (None: the layer only slides, policies do not apply), `stored` the mean tokens
    held per sequence with the window, `evicted` the tokens dropped, `read` the mean tokens that the
    last decoded token read; `prompt_read` is, by layer, the part of the blocks up to their tile
    that prompts' tiles read since the cache was made, reset or forked (None: they read everything).
    `overshoot` is the most tokens by which a head came to exceed `max_tokens` during a prompt call,
    `cap_evicted` the tokens dropped because a cap was reached. `floored` counts, for each layer,
    the sequences whose budget was less than the window at their last eviction, so that the window
    was kept instead. `devices` are keys and values in bytes by device, where layers lie on several.
    `ranks` are the reports of each rank where this one is of all ranks of a
    tensor-parallel model; blocks that prompts read are then a mean over ranks.
    """

    pages: int
    reserved: int
    ring: int
    positions: int
    summaries: int
    tables: int
    queries: int
    dense: int
    sequences: int
    tokens: int
    admitted: list[list[float] | None]
    stored: list[list[float]]
    evicted: list[list[int]]
    read: list[list[float]]
    policies: dict[str, dict[str, list[int]]]
    sliding_layers: list[int]
    shared_pages: int
    overshoot: int
    cap_evicted: int
    floored: list[int]
    states: int = 0
    prompt_read: list[float | None] = attrs.field(factory=list)
    numbers: int = 0
    statistics: int = 0
    devices: dict[str, int] = attrs.field(factory=dict)
    ranks: list[Report] = attrs.field(factory=list)

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
            + self.states
            + self.numbers
            + self.statistics
        )

    @property
    def kv(self) -> int:
        """Keys and values in bytes, those of pages and ring."""
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

    @property
    def mean_stored(self) -> float:
        """Tokens that a head holds, the mean over all of them."""
        values = [x for layer in self.stored for x in layer]
        return sum(values) / len(values)

    def __str__(self) -> str:
        return report_table(self).text()

    def _repr_html_(self) -> str:
        return report_table(self).html()


def report(state: CacheState) -> Report:
    """Measures a cache; reads the device."""
    pages = reserved = positions = summaries = shared = 0
    devices: dict[str, int] = {}
    for pool in state.devices.pools:
        used, capacity = pool.used, pool.capacity
        k, v, meta, summary = (storage_bytes(parts) for parts in zip(*pool.extents, strict=True))
        held = (k + v) * used // capacity
        pages += held
        devices[str(pool.device)] = devices.get(str(pool.device), 0) + held
        positions += meta * used // capacity
        summaries += summary * used // capacity
        reserved += sum(x - x * used // capacity for x in (k + v, meta, summary))
        shared += int((pool.refs > 1).sum())
    for layer in state.layers:
        devices[str(layer.pool.device)] += storage_bytes(layer.ring)
    known = _held(state)
    return Report(
        pages=pages,
        reserved=reserved,
        ring=ring_bytes(state),
        positions=positions,
        summaries=summaries,
        tables=table_bytes(state),
        queries=query_bytes(state),
        numbers=number_bytes(state),
        dense=dense_bytes(state),
        sequences=state.batch,
        tokens=sum(state.lengths),
        admitted=[None if x.slides else known[x.index].admitted for x in state.layers],
        stored=[known[x.index].stored for x in state.layers],
        evicted=[known[x.index].evicted for x in state.layers],
        read=[_read(x, known[x.index]) for x in state.layers],
        policies={slot: _acting(state, slot) for slot in SLOTS},
        sliding_layers=[x.index for x in state.layers if x.slides],
        shared_pages=shared,
        overshoot=max(row.overshoot for row in state.sequences),
        cap_evicted=sum(row.cap_evicted for row in state.sequences),
        floored=[_floored(state, x) for x in state.layers],
        statistics=statistics_bytes(state),
        prompt_read=[_prompt_read(x) for x in state.layers],
        devices=devices if len(devices) > 1 else {},
    )


def _acting(state: CacheState, slot: str) -> dict[str, list[int]]:
    """The layers of each policy of a slot that does something, by its name."""
    found: dict[str, list[int]] = {}
    for layer in state.managed:
        policy = getattr(layer, slot)
        prompts = isinstance(policy, Selection) and policy.tile is not None
        if prompts or not policy.neutral:
            found.setdefault(_name(policy), []).append(layer.index)
    return found


def _name(policy: Any) -> str:
    """The class, with those of the policies inside."""
    if isinstance(policy, PerPhase):
        return f"PerPhase({_name(policy.prefill)}, {_name(policy.decode)})"
    inner = getattr(policy, "admission", None)
    members = getattr(policy, "policies", () if inner is None else (inner,))
    names = ", ".join(_name(x) for x in members)
    return f"{type(policy).__name__}({names})" if names else type(policy).__name__


class _Held(NamedTuple):
    """What the host knows of a layer: `counts` `[B, Hkv]`, and `near` `[B]`, tokens in each window.

    Of each head the mean tokens `stored`, the fraction `admitted` and how many were `evicted`.
    """

    counts: torch.Tensor
    near: torch.Tensor
    stored: list[float]
    admitted: list[float]
    evicted: list[int]


def _held(state: CacheState) -> dict[int, _Held]:
    """By layer. Those that are alike are read together: a device is waited for once."""
    alike: dict[Any, list[LayerStore]] = {}
    for layer in state.layers:
        key = layer.device, layer.counts.shape, layer.ring.flags.shape, layer.window
        alike.setdefault(key, []).append(layer)
    found, lengths = {}, torch.tensor(state.lengths)[:, None]
    for (device, _, (*_, slots), window), layers in alike.items():
        at = ring_positions(lengths, slots)
        near = ((at >= lengths - window) & (at >= 0))[:, None].to(device)
        flags = torch.stack([x.ring.flags for x in layers])  # [L, B, Hkv, slots]
        flagged = (((flags & ADMITTED) > 0) & near).sum(-1)
        counts = torch.stack([x.counts for x in layers]).long()
        evicted = torch.stack([x.evicted for x in layers]).long()
        parts = torch.stack([counts, evicted, flagged]).cpu()  # [3, L, B, Hkv]
        held, within = parts[0], lengths[:, 0].clamp(max=window)
        by_head = (
            (held + within[:, None]).double().mean(1).tolist(),
            (parts.sum(0).sum(1) / max(sum(state.lengths), 1)).tolist(),
            parts[1].sum(1).tolist(),
        )
        for n, layer in enumerate(layers):
            found[layer.index] = _Held(held[n], within, *(x[n] for x in by_head))
    return found


def _floored(state: CacheState, layer: LayerStore) -> int:
    budget = None if layer.slides else budget_of(layer.eviction)
    if budget is None:
        return 0
    lengths = [row.considered_at for row in state.sequences if row.considered_at]
    return sum(budget.floored(n, layer.window, layer.index, state.spec.layers) for n in lengths)


def _prompt_read(layer: LayerStore) -> float | None:
    if layer.chosen is None:
        return None
    chosen, there = layer.chosen.tolist()
    return float(chosen / there)


def _read(layer: LayerStore, known: _Held) -> list[float]:
    if layer.selected is None:
        return list(known.stored)
    size = layer.pool.page_size
    selected = layer.selected.cpu()
    counts = known.counts.repeat_interleave(selected.shape[1] // known.counts.shape[1], 1)
    held = (counts[..., None] - selected * size).clamp(max=size)
    tokens = torch.where(selected >= 0, held, 0).sum(-1) + known.near[:, None]
    return tokens.double().mean(0).tolist()
