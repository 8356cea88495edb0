"""CacheSpec of a transformers model, and the modules that the adapter hooks."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..._fields import shown
from ...errors import UnsupportedError
from ...spec import CacheSpec, Sizes, check_sizes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SAMPLES = 64  # elements read of each parameter
_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def decoder_of(model: Any) -> Any:
    """The decoder stack of a causal language model, through wrappers such as PEFT's."""
    _check_model(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder() if hasattr(base, "get_decoder") else base


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
    family = getattr(decoder.config, "model_type", None)
    if family not in FAMILIES:
        raise UnsupportedError(
            f"model: {type(model).__name__} has model_type {family!r}; the adapters serve "
            f"{', '.join(FAMILIES)}"
        )
    found = [m for m in decoder.modules() if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    found.sort(key=lambda m: m.layer_idx)
    if [m.layer_idx for m in found] != list(range(decoder.config.num_hidden_layers)):
        raise UnsupportedError(
            f"model: wanted {decoder.config.num_hidden_layers} attention layers, found {len(found)}"
        )
    return found


def key_source(module: Any) -> nn.Module:
    """The submodule of an attention module whose output are its keys before RoPE."""
    return module.k_norm if hasattr(module, "k_norm") else module.k_proj


def sliding_windows(model: nn.Module) -> tuple[int | None, ...]:
    """The window of each layer that only slides, None for the others."""
    config = decoder_of(model).config
    if config.model_type == "mistral":
        return (config.sliding_window,) * config.num_hidden_layers
    return tuple(getattr(m, "sliding_window", None) for m in attention_modules(model))


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shards(weight: Any) -> tuple[int, int]:
    """Which part of a tensor-parallel weight's rows this rank holds, and of how many."""
    for axis, placement in enumerate(getattr(weight, "placements", ())):
        if placement.is_shard(0) and weight.device_mesh.size(axis) > 1:
            return weight.device_mesh.get_local_rank(axis), weight.device_mesh.size(axis)
    return 0, 1


def spec_of(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **sizes: Unpack[Sizes],
) -> CacheSpec:
    """The cache sizes of `model`; under tensor parallelism those of this rank's heads.

    Raises TypeError for a word that names no size, UnsupportedError for a model not served.
    """
    attention = attention_modules(model)
    check_sizes(sizes)
    config = decoder_of(model).config
    weight = next(p for p in model.parameters() if p.is_floating_point())
    sliding = sliding_windows(model)
    part, parts = shards(attention[0].k_proj.weight)
    kv_heads = config.num_key_value_heads // parts
    return CacheSpec(
        layers=len(attention),
        heads=config.num_attention_heads // parts,
        kv_heads=kv_heads,
        head_dim=head_dim_of(config),
        dtype=dtype or weight.dtype,
        device=device or weight.device,
        scale=attention[0].scaling,
        sliding=sliding if any(w is not None for w in sliding) else (),
        head_offset=part * kv_heads,
        all_kv_heads=config.num_key_value_heads,
        **sizes,
    )


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the model's config and of a few elements of every parameter.

    Tells fine-tuned or merged weights from others; an edit that spares every sampled element goes
    unnoticed.
    """
    decoder = decoder_of(model)
    config = {
        name: value
        for name, value in decoder.config.to_dict().items()
        if name not in _VOLATILE and "attn_implementation" not in name
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    samples = [_sample(parameter) for parameter in decoder.parameters()]
    for device in {sample.device for sample in samples}:
        here = [sample for sample in samples if sample.device == device]
        digest.update(torch.cat(here).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    local = getattr(parameter, "to_local", lambda: parameter)().detach().flatten()
    step = max(local.numel() // SAMPLES, 1)
    return local[::step][:SAMPLES].float()


def keys_fingerprint(model: nn.Module) -> str:
    """Short hash of a model's attention shape and of its first key projection in bf16."""
    config = decoder_of(model).config
    shape = (
        config.model_type,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
        config.vocab_size,
    )
    weight = attention_modules(model)[0].k_proj.weight
    bits = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
    digest = hashlib.sha256(repr(shape).encode())
    digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]
