"""Making an empty cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from ..admission._base import Admission
from ..eviction._base import Eviction
from ..selection._base import Selection
from ..spec import CacheSpec
from .layer import LayerStore
from .pages import PagePool
from .state import CacheState, _bucket

if TYPE_CHECKING:
    from ..ops import Ops


def allocate(
    spec: CacheSpec,
    batch: int,
    ops: Ops,
    window: int,
    admission: Admission,
    selection: Selection,
    eviction: Eviction,
) -> CacheState:
    """A CacheState with placed policies, rings and one page pool; no pages are in use."""
    device = torch.empty(0, device=spec.device).device  # "cuda" becomes the current device
    spec = attrs.evolve(spec, device=device)
    state = CacheState(spec, ops, batch)
    state.lengths_on[device] = torch.zeros(batch, dtype=torch.int64, device=device)
    state.active_on[device] = torch.ones(batch, dtype=torch.bool, device=device)
    state.cu_one[device] = torch.arange(batch + 1, dtype=torch.int32, device=device)
    pool = PagePool(
        page_size=spec.page_size,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        device=device,
        summary=_summary_size(selection, spec),
        moving=ops.backend == "reference",
        copy=ops.copy_pages,
    )
    if spec.max_bytes is not None:
        pool.cap(spec.max_bytes)
    state.pools[device] = pool
    pool.holders[state] = 0
    admission = admission.place(device, spec.dtype, ops.backend)
    eviction = eviction.place(device, spec.dtype, ops.backend)

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    for index in range(spec.layers):
        slides = spec.slides(index)
        near = window if slides is None else slides
        slots, heads = near + spec.rollback, spec.kv_heads
        layer = LayerStore(
            index=index,
            window=near,
            slides=slides is not None,
            ring_k=zeros(heads, slots, spec.head_dim, dtype=spec.dtype),
            ring_v=zeros(heads, slots, spec.head_dim, dtype=spec.dtype),
            ring_flags=zeros(heads, slots, dtype=torch.uint8),
            table=zeros(heads, 1 if slides is not None else _bucket(1), dtype=torch.int32),
            counts=zeros(heads, dtype=torch.int32),
            evicted=zeros(heads, dtype=torch.int64),
            pool=pool,
            admission=admission.at(index),
            selection=selection.at(index),
            eviction=eviction.at(index),
        )
        if layer.eviction.queries and not layer.slides:
            layer.queries = zeros(
                spec.heads, layer.eviction.queries + spec.rollback, spec.head_dim, dtype=spec.dtype
            )
        state.layers.append(layer)
    return state


def _summary_size(policy: Selection, spec: CacheSpec) -> tuple[int, torch.dtype] | None:
    """Width and dtype of a page summary: the widest over layers, tried on an empty page."""
    found: tuple[int, torch.dtype] | None = None
    keys = torch.zeros(1, spec.page_size, spec.head_dim, dtype=spec.dtype)
    valid = torch.ones(1, spec.page_size, dtype=torch.bool)
    for layer in range(spec.layers):
        selection = policy.at(layer)
        if selection.neutral:
            continue
        summary = selection.summarize(keys, valid)
        if summary.ndim != 2 or summary.shape[0] != 1 or not summary.dtype.is_floating_point:
            raise ValueError(
                f"{type(selection).__name__}.summarize: wanted floats [N, S], got {summary.dtype} "
                f"{list(summary.shape)} for N = 1"
            )
        if found is not None and found[1] != summary.dtype:
            raise ValueError(
                f"selection: summaries have different dtypes: {found[1]} and {summary.dtype}"
            )
        found = (max(summary.shape[1], found[0] if found else 0), summary.dtype)
    return found
