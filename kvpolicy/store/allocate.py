"""Making an empty cache."""

from __future__ import annotations

import attrs
import torch

from ..admission import Admission
from ..eviction import Eviction
from ..exchange import ALONE, Exchange
from ..ops import Numbers, Ops, Ring
from ..selection import Selection
from ..spec import CacheSpec
from . import moments
from .devices import Devices
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
) -> CacheState:
    """A CacheState with placed policies, rings and page pools; no pages are in use.

    On the "meta" device it takes no memory and its sizes are those of a real one.
    """
    device = torch.empty(0, device=spec.device).device  # "cuda" becomes the current device
    spec = attrs.evolve(spec, device=device)
    summaries = summary_sizes(selection, spec)
    pools = {pages: _pool(spec, pages, ops, summaries.get(pages)) for pages in _kinds(spec)}
    state = CacheState(spec, ops, Devices([device], pools.values(), batch), batch, exchange)
    if device.type != "meta":
        admission = admission.place(device, spec.dtype, ops.backend)
        eviction = eviction.place(device, spec.dtype, ops.backend)

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    for index in range(spec.layers):
        sizes = spec.at(index)
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
            pool=pools[sizes.pages],
            admission=admission.at(index),
            selection=selection.at(index),
            eviction=eviction.at(index),
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


def _kinds(spec: CacheSpec) -> list[tuple[int, int, int]]:
    """The kinds of pages of the model's layers; each kind has a pool of its own."""
    return list(dict.fromkeys(spec.at(index).pages for index in range(spec.layers)))


def _pool(
    spec: CacheSpec,
    pages: tuple[int, int, int],
    ops: Ops,
    summary: tuple[int, torch.dtype] | None,
) -> PagePool:
    pool = PagePool(
        page_size=spec.page_size,
        head_dim=pages[1],
        value_dim=pages[2],
        dtype=spec.dtype,
        device=spec.device,
        summary=summary,
        moving=ops.backend == "reference",
        copy=lambda *places: ops.copy_pages(*places),  # the op is imported when it is first used
    )
    if spec.max_bytes is not None:
        pool.limit_to(spec.max_bytes)
    return pool


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
