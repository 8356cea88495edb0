"""Making an empty cache."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch

from ..admission import Admission
from ..eviction import Eviction
from ..exchange import ALONE, Exchange
from ..ops import Numbers, Ops, Ring
from ..selection import Selection
from ..spec import CacheSpec, Kind
from . import moments
from .devices import Devices
from .extents import SLAB_PAGES
from .layer import LayerStore
from .numbers import capacity_of, counts_queries, has_numbers
from .pool import PagePool
from .state import CacheState, _bucket


def allocate(
    spec: CacheSpec,
    batch: int,
    ops: Ops,
    window: int,
    admission: Admission,
    selection: Selection,
    eviction: Eviction,
    exchange: Exchange = ALONE,
    dry: bool = False,
) -> CacheState:
    """A CacheState with placed policies, rings and page pools; no pages are in use.

    A `dry` one lies on the "meta" device: it takes no memory, its sizes are those of a real one.
    """
    spec = spec if dry else _indexed(spec)
    summaries = summary_sizes(selection, spec)
    on = {device: torch.device("meta") if dry else device for device in _devices(spec)}
    pools = {
        kind: _pool(spec, kind, on[kind[0]], ops, summaries.get(kind[1:])) for kind in _kinds(spec)
    }
    _limit(spec, pools)
    devices = Devices(dict.fromkeys(on.values()), pools.values(), batch)
    state = CacheState(spec, ops, devices, batch, exchange)
    if dry:
        placed = dict.fromkeys(on, (admission, eviction))
    else:
        where = spec.dtype, ops.backend
        placed = {x: (admission.place(x, *where), eviction.place(x, *where)) for x in on}

    for index in range(spec.layers):
        sizes, planned = spec.at(index), spec.device_of(index)
        device = on[planned]
        admits, evicts = placed[planned]

        def zeros(*shape: int, dtype: torch.dtype, device: torch.device = device) -> torch.Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        slides = sizes.window is not None
        near = window if sizes.window is None else sizes.window
        slots, heads = near + spec.rollback, sizes.kv_heads
        layer = LayerStore(
            index=index,
            sizes=sizes,
            window=near,
            slides=slides,
            ring=Ring(
                zeros(heads, slots, sizes.head_dim, dtype=spec.dtype),
                zeros(heads, slots, sizes.value_dim, dtype=spec.dtype),
                zeros(heads, slots, dtype=torch.uint8),
            ),
            table=zeros(heads, 1 if slides else _bucket(1), dtype=torch.int32),
            counts=zeros(heads, dtype=torch.int32),
            evicted=zeros(heads, dtype=torch.int64),
            pool=pools[spec.kind_of(index)],
            admission=admits.at(index),
            selection=selection.at(index),
            eviction=evicts.at(index),
        )
        if not slides and not layer.eviction.neutral and has_numbers(layer.eviction):
            wide = torch.promote_types(spec.dtype, torch.float32)
            layer.numbers = Numbers(
                zeros(heads, capacity_of(0), dtype=wide), zeros(heads, slots, dtype=wide)
            )
        # What accumulates waits in the ring of queries until it cannot be taken back.
        observed = max(layer.eviction.queries, int(counts_queries(layer)))
        if observed and not slides:
            kept = observed + spec.rollback
            layer.queries = zeros(sizes.heads, kept, sizes.head_dim, dtype=spec.dtype)
        if layer.eviction.query_stats and not slides:
            wide = torch.promote_types(spec.dtype, torch.float32)
            shape = sizes.heads, sizes.head_dim
            kept = moments.slots(spec.rollback)
            layer.query_ring = zeros(shape[0], kept, shape[1], dtype=spec.dtype)
            layer.query_sums = zeros(*shape, dtype=wide)
            layer.query_products = zeros(*shape, shape[1], dtype=wide)
        if layer.eviction.hidden and not slides:
            assert spec.hidden is not None  # `CachePipeline.check` says so
            kept = layer.eviction.hidden + spec.rollback
            layer.hidden = zeros(1, kept, spec.hidden, dtype=spec.dtype)
        state.add_layer(layer)
    return state


def _indexed(spec: CacheSpec) -> CacheSpec:
    """With "cuda" as the current device."""
    named = dict.fromkeys((spec.device, *spec.devices))
    on = {device: torch.empty(0, device=device).device for device in named}
    return attrs.evolve(spec, device=on[spec.device], devices=[on[x] for x in spec.devices])


def _devices(spec: CacheSpec) -> list[torch.device]:
    return list(dict.fromkeys(spec.devices or (spec.device,)))


def _kinds(spec: CacheSpec) -> list[Kind]:
    """The kinds of pages of the model's layers; each kind has a pool of its own."""
    return list(dict.fromkeys(map(spec.kind_of, range(spec.layers))))


def _limit(spec: CacheSpec, pools: Mapping[Kind, PagePool]) -> None:
    """Gives each pool its part of `max_bytes`, in the proportion of what a token takes there."""
    if spec.max_bytes is None:
        return
    widths = spec.token_widths
    total = sum(widths.values())
    firsts = [SLAB_PAGES * pools[x].page_bytes * total / width for x, width in widths.items()]
    least = math.ceil(max(firsts, default=0))
    if len(widths) > 1 and spec.max_bytes < least:
        raise ValueError(
            f"max_bytes: wanted at least {least}, the first {SLAB_PAGES} pages of each device and "
            f"size of heads, got {spec.max_bytes}"
        )
    for kind, width in widths.items():
        pools[kind].limit_to(spec.max_bytes * width // total)


def _pool(
    spec: CacheSpec,
    kind: Kind,
    device: torch.device,
    ops: Ops,
    summary: tuple[int, torch.dtype] | None,
) -> PagePool:
    return PagePool(
        page_size=spec.page_size,
        head_dim=kind[2],
        value_dim=kind[3],
        dtype=spec.dtype,
        device=device,
        summary=summary,
        moving=ops.backend == "reference",
        copy=lambda *places: ops.copy_pages(*places),  # the op is imported when it is first used
    )


def summary_sizes(
    policy: Selection, spec: CacheSpec
) -> dict[tuple[int, int, int], tuple[int, torch.dtype]]:
    """Width and dtype of page summaries by kind of pages: the widest over its layers.

    Tried on an empty page.
    """
    found: dict[tuple[int, int, int], tuple[int, torch.dtype]] = {}
    for layer in spec.managed:
        selection, sizes = policy.at(layer), spec.at(layer)
        if selection.neutral:
            continue
        keys = torch.zeros(1, spec.page_size, sizes.head_dim, dtype=spec.dtype)
        valid = torch.ones(1, spec.page_size, dtype=torch.bool)
        summary = selection.summarize(keys, valid)
        if summary.ndim != 2 or summary.shape[0] != 1 or not summary.dtype.is_floating_point:
            raise ValueError(
                f"{type(selection).__name__}.summarize: wanted floats [N, S], got {summary.dtype} "
                f"{list(summary.shape)} for N = 1"
            )
        width, dtype = found.get(sizes.pages, (0, summary.dtype))
        if dtype != summary.dtype:
            raise ValueError(
                f"selection: summaries have different dtypes: {dtype} and {summary.dtype}"
            )
        found[sizes.pages] = max(summary.shape[1], width), dtype
    return found
