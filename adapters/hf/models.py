"""What is known of a transformers model: where its decoder is, and what its attention computes on.

Attaching, training and evaluation read models through this module alone. No family is named: a
model is served because `probe` found what the cache needs to know of it.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import attrs
import torch
from torch import Tensor, nn

from ..._fields import shown
from ...errors import UnsupportedError
from ...spec import CacheSpec, LayerSizes, Sizes, check_sizes
from .kinds import text_config
from .probe import probe
from .ranks import Ranks
from .records import PreRope, Probe, ProbedLayer
from .wrappers import base_of

_SERVED: weakref.WeakKeyDictionary[nn.Module, Served] = weakref.WeakKeyDictionary()


def decoder_of(model: Any) -> Any:
    """The decoder stack of a language model, through wrappers and around other modalities."""
    _check_model(model)
    found = base_of(model)
    while hasattr(found, "get_decoder"):
        inner = base_of(found.get_decoder())
        if inner is found:
            break
        found = inner
    return found


@attrs.frozen(eq=False, kw_only=True)
class AttentionLayer:
    """What the attention of one layer computes on, on this rank.

    Attributes:
        module: the attention module.
        place: of the layer in transformers' cache.
        window: keys that a query sees, of a layer that only slides; None where it sees all.
        chunk: size of chunks across which no query sees.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of queries and keys.
        value_dim: channels of values.
        scale: factor of q.k.
        softcap: bound of the product.
        sinks: name of the attention function's argument that brings sinks, "" without.
        shared: whether other layers read its keys.
        source: the submodule whose output `pre_rope` starts from, None where there is none.
        pre_rope: how keys before RoPE are had, None where there is no way.
        no_pre_rope: why not.
        dtype: of its keys and values.
        device: where it runs.
    """

    module: Any
    place: int
    window: int | None
    chunk: int | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    sinks: str
    shared: bool
    source: nn.Module | None
    pre_rope: PreRope | None
    no_pre_rope: str
    dtype: torch.dtype
    device: torch.device


@attrs.frozen(eq=False, kw_only=True)
class Served:
    """A model that the rule serves.

    Attributes:
        config: of its text decoder.
        layers: those with keys of their own, in the order of transformers' cache.
        readers: attention modules that read the keys of other layers alone.
        places: the index in `layers` by the place in transformers' cache.
        probe: how it was checked.
    """

    config: Any
    layers: tuple[AttentionLayer, ...]
    readers: tuple[Any, ...]
    places: dict[int, int]
    probe: Probe

    @property
    def modules(self) -> list[Any]:
        """Every attention module, each once."""
        found = [layer.module for layer in self.layers] + list(self.readers)
        return list({id(module): module for module in found}.values())


def served(model: nn.Module, *, verify: bool = True) -> Served:
    """What is known of `model`, after a check by the rule; see `probe`.

    Raises UnsupportedError for a model that is not served.
    """
    decoder = decoder_of(model)
    if decoder not in _SERVED:
        _SERVED[decoder] = _served(model, decoder, probe(model))
    return _SERVED[decoder]


def _served(model: nn.Module, decoder: nn.Module, found: Probe) -> Served:
    config, base = text_config(decoder.config), base_of(model)
    read = {layer.reads for layer in found.layers if layer.shared}
    layers = [_layer(base, config, layer, layer.layer in read) for layer in found.stored]
    if not layers:
        raise UnsupportedError("model: no layer keeps keys and values, there is nothing to cache")
    readers = [base.get_submodule(layer.module) for layer in found.layers if layer.shared]
    places = {layer.place: index for index, layer in enumerate(layers)}
    return Served(
        config=config, layers=tuple(layers), readers=tuple(readers), places=places, probe=found
    )


def _layer(base: nn.Module, config: Any, found: ProbedLayer, shared: bool) -> AttentionLayer:
    module = base.get_submodule(found.module)
    name = _source(found.pre_rope)
    return AttentionLayer(
        module=module,
        place=found.layer,
        window=found.window if found.chunk is None else found.chunk,
        chunk=found.chunk,
        heads=found.heads,
        kv_heads=found.kv_heads,
        head_dim=found.head_dim,
        value_dim=found.value_dim,
        scale=found.scale,
        softcap=found.softcap,
        sinks=found.sinks_keyword,
        shared=shared,
        source=base.get_submodule(name) if name else None,
        pre_rope=found.pre_rope,
        no_pre_rope=found.no_pre_rope,
        dtype=_dtype_of(module, _parent(base, found.module), config),
        device=_device_of(module, _parent(base, found.module)),
    )


def _source(rule: PreRope | None) -> str:
    """The submodule whose output keys before RoPE are made from, "" where there is none."""
    if rule is None or rule.form == "same":
        return ""
    return rule.module if rule.form == "module" or rule.rotation is None else rule.rotation.module


def _parent(base: nn.Module, name: str) -> nn.Module:
    """The decoder layer around an attention module."""
    return base.get_submodule(name.rpartition(".")[0])


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers of `model` that keep keys and values, in order.

    Raises UnsupportedError for a model that is not served.
    """
    return list(served(model).layers)


def check_pre_rope(model: nn.Module) -> None:
    """Raises UnsupportedError for a model whose keys before RoPE cannot be had."""
    for index, layer in enumerate(attention_layers(model)):
        if layer.pre_rope is None and layer.window is None:
            raise UnsupportedError(
                f"model: keys before RoPE, which the policy reads, cannot be had in layer {index} "
                f"of {type(decoder_of(model)).__name__}: {layer.no_pre_rope}"
            )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = f"; load it: AutoModelForCausalLM.from_pretrained({model!r})"
        raise TypeError(
            f"model: wanted a model of transformers, got {shown(model)}"
            + (hint if isinstance(model, str) else "")
        )


def attention_modules(model: nn.Module) -> list[Any]:
    """Every attention module; raises UnsupportedError for models that are not served."""
    return served(model).modules


def shards(module: Any) -> tuple[int, int]:
    """Which part of a tensor-parallel layer's heads this rank holds, and of how many."""
    ranks = _ranks_of(module)
    return (ranks.rank, ranks.mesh.size(ranks.axis)) if ranks.many else (0, 1)


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that share the heads of `model`."""
    return _ranks_of(served(model).layers[0].module)


def _ranks_of(module: nn.Module) -> Ranks:
    for weight in module.parameters():
        for axis, placement in enumerate(getattr(weight, "placements", ())):
            if placement.is_shard(0) and weight.device_mesh.size(axis) > 1:
                return Ranks(weight.device_mesh, axis)
    return Ranks()


def check_one_device(model: nn.Module) -> None:
    """Raises UnsupportedError for a model whose attention layers run on several devices."""
    found = sorted({str(layer.device) for layer in attention_layers(model)})
    if len(found) > 1:
        raise UnsupportedError(
            f"model: its layers run on {', '.join(found)}, a cache is on one device; load it on "
            "one by device_map='cuda', or if it does not fit there split its heads by "
            "tp_plan='auto' under torchrun"
        )


def _dtype_of(module: Any, layer: nn.Module, config: Any) -> torch.dtype:
    """The dtype of what the key and value projections put out.

    Quantised projections hold bits, and put out the dtype that comes in: that of the layer's norms.
    """
    found: list[Any] = [getattr(p, "weight", None) for p in _projections(module)]
    if not all(isinstance(x, Tensor) and _computes(x) for x in found):
        found = [p for p in layer.parameters() if p.ndim == 1 and _computes(p)][:1]
    if not found:
        return getattr(config, "dtype", None) or torch.get_default_dtype()
    widest: torch.dtype = functools.reduce(torch.promote_types, [x.dtype for x in found])
    return widest


def _projections(module: Any) -> list[Any]:
    """The submodules that put out keys and values, as far as their names tell; else all."""
    named = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    found = [x for x in named if isinstance(x, nn.Module)]
    return found or [x for x in module.children() if list(x.parameters()) + list(x.buffers())]


def _computes(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def _device_of(module: Any, layer: nn.Module) -> torch.device:
    """Where the key projection runs, which weights that accelerate moves there may not say."""
    projections = _projections(module)
    for part in (*projections[:1], module, layer):
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    tensors: Iterator[Tensor] = itertools.chain(
        *(x for p in projections[:1] for x in (p.parameters(), p.buffers())),
        layer.parameters(),
        layer.buffers(),
    )
    return next(tensors).device


def spec_of(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **sizes: Unpack[Sizes],
) -> CacheSpec:
    """The cache sizes of `model`; under tensor parallelism those of this rank's heads.

    `dtype` and `device` replace those of the attention layers: the widest dtype of their keys and
    values, the first layer's device. `sizes` passes `page_size`, `rollback` and `interval` on.
    Raises TypeError for a word that names no size, UnsupportedError for a model not served.
    """
    layers = attention_layers(model)
    check_sizes(sizes)
    each = tuple(
        LayerSizes(
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            scale=layer.scale,
            softcap=layer.softcap,
            window=layer.window,
            chunk=layer.chunk,
            shared=layer.shared,
        )
        for layer in layers
    )
    first = next((x for x in each if x.window is None), each[0])
    part, parts = shards(layers[0].module)
    uniform = CacheSpec(
        layers=len(layers),
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        dtype=dtype or functools.reduce(torch.promote_types, [layer.dtype for layer in layers]),
        device=device or layers[0].device,
        scale=first.scale,
        sliding=_windows(each),
        head_offset=part * first.kv_heads,
        all_kv_heads=parts * first.kv_heads,
        **sizes,
    )
    if all(uniform.at(index) == own for index, own in enumerate(each)):
        return uniform
    return attrs.evolve(uniform, sliding=(), per_layer=each)


def _windows(each: Sequence[LayerSizes]) -> tuple[int | None, ...]:
    windows = tuple(x.window for x in each)
    return windows if any(w is not None for w in windows) else ()
