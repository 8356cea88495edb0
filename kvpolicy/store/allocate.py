"""Making an empty cache."""

from __future__ import annotations

import attrs
import torch

from ..admission import Admission
from ..eviction import Eviction
from ..ops import Ops, Ring
from ..selection import Selection
from ..spec import CacheSpec
from .devices import Devices
from .layer import LayerStore
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
) -> CacheState:
    """A CacheState with placed policies, rings and page pools; no pages are in use.

    On the "meta" device it takes no memory and its sizes are those of a real one.
    """
    device = torch.empty(0, device=spec.device).device  # "cuda" becomes the current device
    spec = attrs.evolve(spec, device=device)
    summary = summary_size(selection, spec)
    pools = {dim: _pool(spec, dim, ops, summary) for dim in _page_dims(spec)}
    state = CacheState(spec, ops, Devices([device], pools.values(), batch), batch)
    if device.type != "meta":
        admission = admission.place(device, spec.dtype, ops.backend)
        eviction = eviction.place(device, spec.dtype, ops.backend)

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    for index in range(spec.layers):
        sizes = spec.at(index)
        slides = sizes.window is not None
        near = window if sizes.window is None else sizes.window
        slots, heads, dim = near + spec.rollback, sizes.kv_heads, sizes.head_dim
        layer = LayerStore(
            index=index,
            sizes=sizes,
            window=near,
            slides=slides,
            ring=Ring(
                zeros(heads, slots, dim, dtype=spec.dtype),
                zeros(heads, slots, dim, dtype=spec.dtype),
                zeros(heads, slots, dtype=torch.uint8),
            ),
            table=zeros(heads, 1 if slides else _bucket(1), dtype=torch.int32),
            counts=zeros(heads, dtype=torch.int32),
            evicted=zeros(heads, dtype=torch.int64),
            pool=pools[dim],
            admission=admission.at(index),
            selection=selection.at(index),
            eviction=eviction.at(index),
        )
        if layer.eviction.queries and not slides:
            layer.queries = zeros(
                sizes.heads, layer.eviction.queries + spec.rollback, dim, dtype=spec.dtype
            )
        state.add_layer(layer)
    return state


def _page_dims(spec: CacheSpec) -> list[int]:
    """The head dims of the model's layers; pages of each come from a pool of their own."""
    return list(dict.fromkeys(spec.at(index).head_dim for index in range(spec.layers)))


def _pool(
    spec: CacheSpec, head_dim: int, ops: Ops, summary: tuple[int, torch.dtype] | None
) -> PagePool:
    pool = PagePool(
        page_size=spec.page_size,
        head_dim=head_dim,
        dtype=spec.dtype,
        device=spec.device,
        summary=summary,
        moving=ops.backend == "reference",
        copy=lambda *places: ops.copy_pages(*places),  # the op is imported when it is first used
    )
    if spec.max_bytes is not None:
        pool.limit_to(spec.max_bytes)
    return pool


def summary_size(policy: Selection, spec: CacheSpec) -> tuple[int, torch.dtype] | None:
    """Width and dtype of a page summary: the widest over layers, tried on an empty page."""
    found: tuple[int, torch.dtype] | None = None
    for layer in range(spec.layers):
        selection = policy.at(layer)
        if selection.neutral:
            continue
        keys = torch.zeros(1, spec.page_size, spec.at(layer).head_dim, dtype=spec.dtype)
        valid = torch.ones(1, spec.page_size, dtype=torch.bool)
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
