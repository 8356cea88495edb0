"""What is known of a transformers model: where its decoder is, and what its attention computes on.

Attaching, training and evaluation read models through this module alone. Its rules read configs
and modules and name no family; `FAMILIES` are the model types on which they were checked.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, Unpack

import attrs
import torch
from torch import Tensor, nn

from ..._arguments import check_dtype, optional
from ..._fields import shown
from ...errors import UnsupportedError
from ...spec import CacheSpec, Sizes, check_sizes
from .ranks import Ranks
from .wrappers import base_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


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
        window: keys that a query sees, of a layer that only slides; None where it sees all.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of a head.
        scale: factor of q.k.
        dtype: of its keys and values.
        device: where it runs.
    """

    module: Any
    window: int | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers of `model` in order.

    Raises:
        UnsupportedError: the model, or the kind of one of its layers, is not served.
    """
    decoder, modules = decoder_of(model), attention_modules(model)
    config, windows = decoder.config, sliding_windows(model)
    layers = getattr(decoder, "layers", modules)
    return [
        AttentionLayer(
            module=module,
            window=window,
            heads=config.num_attention_heads // (parts := shards(module.k_proj)[1]),
            kv_heads=config.num_key_value_heads // parts,
            head_dim=getattr(module, "head_dim", None) or head_dim_of(config),
            scale=module.scaling,
            dtype=_dtype_of(module, layer, config),
            device=_device_of(module, layer),
        )
        for module, layer, window in zip(modules, layers, windows, strict=True)
    ]


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = f"; load it: AutoModelForCausalLM.from_pretrained({model!r})"
        raise TypeError(
            f"model: wanted a model of transformers, got {shown(model)}"
            + (hint if isinstance(model, str) else "")
        )


def attention_modules(model: nn.Module) -> list[Any]:
    """Attention modules in layer order; raises UnsupportedError for models that are not served."""
    decoder = decoder_of(model)
    config: Any = getattr(decoder, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise UnsupportedError(
            f"model: {type(model).__name__} has model_type {family!r}; the adapters serve "
            f"{', '.join(FAMILIES)}"
        )
    found = [m for m in decoder.modules() if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    found.sort(key=lambda m: m.layer_idx)
    if [m.layer_idx for m in found] != list(range(config.num_hidden_layers)):
        raise UnsupportedError(
            f"model: wanted {config.num_hidden_layers} attention layers, found {len(found)}"
        )
    return found


def key_source(module: Any) -> nn.Module:
    """The submodule of an attention module whose output are its keys before RoPE."""
    norm = getattr(module, "k_norm", None)
    found: nn.Module = module.k_proj if norm is None else norm
    return found


def sliding_windows(model: nn.Module) -> tuple[int | None, ...]:
    """The window of each layer that only slides, None for the others.

    The config names each layer's kind, or one `sliding_window` for all, as for transformers' own
    caches. Raises UnsupportedError for other kinds.
    """
    config = decoder_of(model).config
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    served = {"full_attention": None, "sliding_attention": window}
    for layer, kind in enumerate(kinds):
        if kind not in served:
            raise UnsupportedError(
                f"model: layer {layer} is of kind {kind!r}; the adapters serve {', '.join(served)}"
            )
    return tuple(served[kind] for kind in kinds)


def head_dim_of(config: Any) -> int:
    """Channels of a head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def shards(projection: Any) -> tuple[int, int]:
    """Which part of a tensor-parallel layer's rows this rank holds, and of how many."""
    ranks = _ranks_of(projection)
    return (ranks.rank, ranks.mesh.size(ranks.axis)) if ranks.many else (0, 1)


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that share the heads of `model`."""
    return _ranks_of(attention_modules(model)[0].k_proj)


def _ranks_of(projection: Any) -> Ranks:
    weight: Any = getattr(projection, "weight", None)
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
    projections = (module.k_proj, module.v_proj)
    found: list[Any] = [getattr(projection, "weight", None) for projection in projections]
    if not all(isinstance(x, Tensor) and _computes(x) for x in found):
        found = [p for p in layer.parameters() if p.ndim == 1 and _computes(p)][:1]
    if not found:
        return getattr(config, "dtype", None) or torch.get_default_dtype()
    widest: torch.dtype = functools.reduce(torch.promote_types, [x.dtype for x in found])
    return widest


def _computes(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def _device_of(module: Any, layer: nn.Module) -> torch.device:
    """Where the key projection runs, which weights that accelerate moves there may not say."""
    for part in (module.k_proj, module, layer):
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    tensors: Iterator[Tensor] = itertools.chain(
        module.k_proj.parameters(), module.k_proj.buffers(), layer.parameters(), layer.buffers()
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
    optional(check_dtype, "dtype", dtype)
    first = layers[0]
    for index, layer in enumerate(layers):
        for name in ("heads", "kv_heads", "head_dim", "scale"):
            if getattr(layer, name) != getattr(first, name):
                raise UnsupportedError(
                    f"model: layer {index} has {name}={getattr(layer, name)}, layer 0 has "
                    f"{getattr(first, name)}; the adapters serve layers of one size"
                )
    sliding = tuple(layer.window for layer in layers)
    widest = functools.reduce(torch.promote_types, [layer.dtype for layer in layers])
    part, _ = shards(first.module.k_proj)
    return CacheSpec(
        layers=len(layers),
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        dtype=widest if dtype is None else dtype,
        device=first.device if device is None else device,
        scale=first.scale,
        sliding=sliding if any(w is not None for w in sliding) else (),
        head_offset=part * first.kv_heads,
        all_kv_heads=decoder_of(model).config.num_key_value_heads,
        **sizes,
    )
