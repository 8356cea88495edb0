"""A cache as a safetensors file, bound to the model and the pipeline that made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PhaseError
from ..ops import POSITION_MASK
from ..spec import CacheSpec
from .dual_cache import summarize
from .fingerprint import pipeline_fingerprint, tensors_hash
from .layer import LayerStore
from .state import HOST, CacheState

FORMAT = "kvpolicy-cache-1"
_LAYER = ("ring_k", "ring_v", "ring_flags", "counts", "evicted", "queries")
_FREE = ("device", "max_bytes", "max_tokens", "at_cap")  # what a loaded cache may differ in


class Pipeline(Protocol):
    """What saving and loading need of a CachePipeline, which lies above the store."""

    @property
    def admission(self) -> Any: ...
    @property
    def selection(self) -> Any: ...
    @property
    def eviction(self) -> Any: ...
    @property
    def window(self) -> int: ...

    def init(self, spec: CacheSpec, batch: int = 1) -> CacheState: ...


def save(
    state: CacheState,
    path: str | os.PathLike[str],
    pipeline: Pipeline,
    *,
    fingerprint: str = "",
    extra: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a cache to `path`; the file appears whole or not at all.

    Only pages in use are written, each once. `fingerprint` names the model; `extra` tensors and
    `notes` come back from `load`. Raises PhaseError while a call is in flight.
    """
    if state.call is not None:
        raise PhaseError("save: a call is in flight; commit or abort it first")
    tensors = {name: torch.tensor([int(x) for x in getattr(state, name)]) for name in HOST}
    for layer in state.layers:
        found = {name: getattr(layer, name) for name in _LAYER} | _packed(state, layer)
        named = {f"{layer.index}.{name}": x for name, x in found.items() if x is not None}
        tensors |= {name: x.detach().cpu().clone().contiguous() for name, x in named.items()}
    tensors |= {f"extra.{name}": x.cpu().clone().contiguous() for name, x in (extra or {}).items()}
    header = {
        "format": FORMAT,
        "model": fingerprint,
        "pipeline": pipeline_fingerprint(pipeline),
        "spec": json.dumps(_sizes(state.spec)),
        "notes": json.dumps(dict(notes or {})),
    }
    header["checksum"] = tensors_hash(tensors, header)
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=header)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], pipeline: Pipeline, spec: CacheSpec, *, fingerprint: str = ""
) -> tuple[CacheState, dict[str, Tensor], dict[str, str]]:
    """The cache in a file, with the `extra` tensors and the `notes` saved beside it.

    It goes on bit for bit as the saved one would have. Nothing is allocated on the file's word:
    every shape follows from `spec`, `pipeline` and the file's size. A checksum tells damage, not
    malice, from the truth; no file runs code.

    Raises:
        ValueError: the file is truncated or altered, or comes from another model, pipeline or size.
        CapacityError: the pages are more than `spec.max_bytes` allows.
    """
    header, tensors = _read(path)
    if header.get("format") != FORMAT or not header.keys() >= {
        "model",
        "pipeline",
        "spec",
        "notes",
    }:
        raise ValueError(f"path: {path} is no cache of format {FORMAT}")
    checksum = header.pop("checksum", "")
    if tensors_hash(tensors, header) != checksum:
        raise ValueError(f"path: {path} was altered: its checksum does not match")
    _check_origin(header, pipeline, spec, fingerprint)
    batch = tensors["lengths"].numel() if "lengths" in tensors else 0
    for index in range(spec.layers):
        slots = (spec.slides(index) or pipeline.window) + spec.rollback
        _check(tensors, f"{index}.ring_k", (batch, spec.kv_heads, slots, spec.head_dim), spec.dtype)
    state = pipeline.init(spec, batch)
    for name in HOST:
        _check(tensors, name, (batch,), torch.int64)
        values = tensors[name].tolist()
        if not all(0 <= x <= POSITION_MASK for x in values):
            raise ValueError(f"path: altered: {name} is out of range")
        setattr(state, name, [bool(x) for x in values] if name in ("active", "pending") else values)
    state.sync_devices()
    for layer in state.layers:
        _fill(state, layer, tensors)
    prefix = "extra."
    extra = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    return state, extra, json.loads(header["notes"])


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors; safetensors bounds both by the file's size."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {}), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"path: {path} is truncated or no safetensors file: {error}") from None


def _check_origin(
    header: Mapping[str, str], pipeline: Pipeline, spec: CacheSpec, fingerprint: str
) -> None:
    theirs, ours = json.loads(header["spec"]), _sizes(spec)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(f"{name}: the cache was saved with {theirs.get(name)}, got {value}")
    if header["model"] != fingerprint:
        raise ValueError("model: the cache was saved with another model or other weights")
    if header["pipeline"] != pipeline_fingerprint(pipeline):
        raise ValueError(
            "pipeline: the cache was saved with other policies, parameters or weights of a policy"
        )


def _sizes(spec: CacheSpec) -> dict[str, object]:
    found = {a.name: getattr(spec, a.name) for a in attrs.fields(CacheSpec) if a.name not in _FREE}
    found |= {"dtype": str(spec.dtype), "sliding": list(spec.sliding), "scale": spec.softmax_scale}
    return found | {"all_kv_heads": spec.model_kv_heads}


def _columns(state: CacheState) -> int:
    return -(-max(state.lengths) // state.spec.page_size)


def _packed(state: CacheState, layer: LayerStore) -> dict[str, Tensor]:
    """The pages in use, and the table in terms of them: 0 for none, else 1 + place."""
    if layer.slides:
        return {}
    table = layer.table[:, :, : _columns(state)]
    ids, place = table.unique(return_inverse=True)
    first = int(ids.numel() > 0 and ids[0] == 0)
    k, v, meta = state.ops.read_pages(layer.pool.pages, ids[first:])
    held = torch.zeros_like(ids)
    size = state.spec.page_size
    column = torch.arange(table.shape[2], device=table.device)
    tokens = (layer.counts[..., None] - size * column).clamp(0, size)
    held[place.flatten()] = tokens.flatten().to(held)
    # Slots beyond a page's tokens hold leftovers.
    unused = torch.arange(size, device=ids.device) >= held[first:, None]
    return {
        "table": (place + 1 - first).int(),
        "k": k.masked_fill(unused[..., None], 0),
        "v": v.masked_fill(unused[..., None], 0),
        "meta": meta.masked_fill(unused, 0),
    }


def _check(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        got = None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"path: altered: {name}: wanted {dtype} {list(shape)}, got {got}")


def _fill(state: CacheState, layer: LayerStore, tensors: Mapping[str, Tensor]) -> None:
    """Writes one layer's tensors into an empty cache."""
    here, spec = f"{layer.index}.", state.spec
    for name in _LAYER:
        target = getattr(layer, name)
        if target is not None:
            _check(tensors, here + name, tuple(target.shape), target.dtype)
            target.copy_(tensors[here + name])
    if layer.slides:
        return
    size, width = spec.page_size, _columns(state)
    _check(tensors, here + "table", (*layer.table.shape[:2], width), torch.int32)
    table, counts = tensors[here + "table"], tensors[here + "counts"]
    pages = int(table.max()) if table.numel() else 0
    for name in ("k", "v"):
        _check(tensors, here + name, (pages, size, spec.head_dim), spec.dtype)
    _check(tensors, here + "meta", (pages, size), torch.int32)
    most = (torch.tensor(state.lengths) - layer.window).clamp(min=0)[:, None]
    used = torch.arange(width) < -(-counts // size)[..., None]
    fits = torch.equal(used, table > 0) and bool(((counts >= 0) & (counts <= most)).all())
    if not fits or not torch.equal(table[used].unique(), torch.arange(1, pages + 1)):
        raise ValueError(f"path: altered: the page table of layer {layer.index} does not fit")
    state.reserve(max(state.lengths))
    if not pages:
        return
    device = layer.table.device
    ids = layer.pool.take(pages)
    numbers = torch.nn.functional.pad(ids, (1, 0))
    layer.table[:, :, :width] = numbers[table.to(device).long()]
    holders = torch.bincount(table.flatten(), minlength=pages + 1)[1:]
    layer.pool.refs[ids.long()] = holders.to(device).int()
    k, v, meta = (tensors[here + name].to(device) for name in ("k", "v", "meta"))
    slots = torch.arange(pages * size, dtype=torch.int32, device=device)[None]
    state.ops.append(
        layer.pool.pages, ids[None, None], k.flatten(0, 1)[None], v.flatten(0, 1)[None],
        meta.flatten()[None], slots, torch.zeros_like(slots[0]),
    )  # fmt: skip
    span = -(-int(layer.counts.max()) // state.spec.page_size)
    summarize(state, layer, torch.zeros_like(layer.counts), layer.counts, span)
