"""A cache as a safetensors file, bound to the model and the pipeline that made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from .._files import open_safetensors, replacing
from ..errors import PhaseError
from ..exchange import Exchange
from ..ops import POSITION_MASK, pages_of
from ..spec import CacheSpec
from . import moments
from .fingerprint import pipeline_fingerprint, tensors_hash
from .layer import LayerStore, check_sinks
from .numbers import held, hold
from .page_contents import write_pages
from .sequence import SequenceState
from .state import CacheState
from .summaries import summarize

FORMAT = "kvpolicy-cache-1"
# What format 1 calls the numbers of a sequence; others go by the names of their fields.
_FILED = {
    "length": "lengths",
    "evicted_at": "floor",
    "longest": "reached",
    "considered_at": "checked",
    "prompt_open": "pending",
}
_LATER = ("summed", "replayed_at")  # numbers that files of version 0.1.0 lack, where they are 0
# What a loaded cache may differ in.
_FREE = ("device", "devices", "max_bytes", "max_tokens", "at_cap", "hidden")


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

    def init(
        self, spec: CacheSpec, batch: int = 1, exchange: Exchange | None = None
    ) -> CacheState: ...


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
    tensors = {
        filed: torch.tensor([int(getattr(row, name)) for row in state.sequences])
        for name, filed, _ in _numbers()
    }
    for layer in state.layers:
        found = layer.buffers | _packed(state, layer)
        if layer.numbers is not None:
            found["numbers"] = held(layer)
        if layer.sinks is not None:
            found["sinks"] = layer.sinks
        named = {f"{layer.index}.{name}": x for name, x in found.items()}
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
    from safetensors.torch import save_file

    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata=header)


def load(
    path: str | os.PathLike[str],
    pipeline: Pipeline,
    spec: CacheSpec,
    *,
    fingerprint: str = "",
    exchange: Exchange | None = None,
) -> tuple[CacheState, dict[str, Tensor], dict[str, str]]:
    """The cache in a file, with the `extra` tensors and the `notes` saved beside it.

    What it stores is equal bit for bit. Pages may lie elsewhere, by which the reference may round
    an output otherwise. What evictions ask of the model is told anew (`CachePipeline.tell`).
    Nothing is allocated on the file's word: every shape follows from `spec`,
    `pipeline` and the file's size. A checksum tells damage, not malice, from the truth; no file
    runs code.

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
        sizes = spec.at(index)
        slots = (sizes.window or pipeline.window) + spec.rollback
        for name, dim in (("ring_k", sizes.head_dim), ("ring_v", sizes.value_dim)):
            wanted = (batch, sizes.kv_heads, slots, dim)
            _check(tensors, f"{index}.{name}", wanted, spec.dtype)
    state = pipeline.init(spec, batch, exchange)
    for name, filed, kind in _numbers():
        if name in _LATER and filed not in tensors:
            continue
        _check(tensors, filed, (batch,), torch.int64)
        values = tensors[filed].tolist()
        if not all(0 <= x <= POSITION_MASK for x in values):
            raise ValueError(f"path: altered: {filed} is out of range")
        for row, value in zip(state.sequences, values, strict=True):
            setattr(row, name, kind(value))
    if moments.is_full(state, (0,) * batch):
        raise ValueError("path: altered: summed is out of range")
    state.sync_devices()
    for layer in state.layers:
        _fill(state, layer, tensors)
    prefix = "extra."
    extra = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    return state, extra, json.loads(header["notes"])


def _numbers() -> list[tuple[str, str, type]]:
    """Each host number of a sequence: its field, its name in files and its type."""
    defaults = attrs.asdict(SequenceState())
    return [(name, _FILED.get(name, name), type(value)) for name, value in defaults.items()]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors; safetensors bounds both by the file's size."""
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        with open_safetensors(Path(path)) as file:
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
            "pipeline: the cache was saved with other policies, parameters or weights of a policy, "
            "or another window; version 0.1.0's defaults were window=256 and, of AtPromptEnd, "
            'generated="keep"'
        )


def _sizes(spec: CacheSpec) -> dict[str, Any]:
    found = {a.name: getattr(spec, a.name) for a in attrs.fields(CacheSpec) if a.name not in _FREE}
    found |= {"dtype": str(spec.dtype), "sliding": list(spec.sliding), "scale": spec.softmax_scale}
    layers = [attrs.asdict(sizes) for sizes in found.pop("per_layer")]
    if layers:
        found["per_layer"] = layers
    return found | {"all_kv_heads": spec.model_kv_heads}


def _columns(state: CacheState) -> int:
    return pages_of(max(state.lengths), state.spec.page_size)


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
    for name, target in layer.buffers.items():
        if name == "numbers":
            continue
        _check(tensors, here + name, tuple(target.shape), target.dtype)
        target.copy_(tensors[here + name])
    if here + "sinks" in tensors:
        layer.sinks = tensors[here + "sinks"].to(layer.device)
        check_sinks(layer.sinks, layer.sizes.heads, layer.device)
    if layer.slides:
        return
    size, width = spec.page_size, _columns(state)
    _check(tensors, here + "table", (*layer.table.shape[:2], width), torch.int32)
    table, counts = tensors[here + "table"], tensors[here + "counts"]
    pages = int(table.max()) if table.numel() else 0
    for name, dim in (("k", layer.sizes.head_dim), ("v", layer.sizes.value_dim)):
        _check(tensors, here + name, (pages, size, dim), spec.dtype)
    _check(tensors, here + "meta", (pages, size), torch.int32)
    most = (torch.tensor(state.lengths) - layer.window).clamp(min=0)[:, None]
    used = torch.arange(width) < pages_of(counts, size)[..., None]
    fits = torch.equal(used, table > 0) and bool(((counts >= 0) & (counts <= most)).all())
    if not fits or not torch.equal(table[used].unique(), torch.arange(1, pages + 1)):
        raise ValueError(f"path: altered: the page table of layer {layer.index} does not fit")
    state.widen(max(state.lengths))
    if layer.numbers is not None:
        shape = (*counts.shape, int(counts.max()))
        _check(tensors, here + "numbers", shape, layer.numbers.stored.dtype)
        hold(state, layer, tensors[here + "numbers"])
    if not pages:
        return
    device = layer.table.device
    ids = layer.pool.take(pages)
    numbers = torch.nn.functional.pad(ids, (1, 0))
    layer.table[:, :, :width] = numbers[table.to(device).long()]
    holders = torch.bincount(table.flatten(), minlength=pages + 1)[1:]
    layer.pool.refs[ids.long()] = holders.to(device).int()
    k, v, meta = (tensors[here + name].to(device) for name in ("k", "v", "meta"))
    write_pages(state, layer, ids, k, v, meta)
    span = pages_of(int(layer.counts.max()), size)
    summarize(state, layer, torch.zeros_like(layer.counts), span)
