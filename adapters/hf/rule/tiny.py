"""Tiny random models of every type of the installed transformers that generates text."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .tiny_sizes import DEFAULT, HEAD_DIM, SIZES, SPECIAL, WANTED

# Parts of names of parameters that make scores, and of norms on queries and keys.
_SCORES = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn", "wq", "wk", "q_attn")
_NORMS = {
    *("q_norm", "k_norm", "qk_norm", "query_norm", "key_norm"),
    *("q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"),
}


def causal_types() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_types() -> list[str]:
    """Every other model type that generates text from images and text."""
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(causal_types()))


def class_of(model_type: str) -> Any:
    """The class of the model of `model_type` that generates text."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    name = name or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def default_config(model_type: str) -> Any:
    """The default config from which the model of `model_type` is made."""
    config = CONFIG_MAPPING[model_type](**DEFAULT.get(model_type, {}))
    model_class = class_of(model_type)
    # A causal LM of a multimodal type may be made from a part of its config.
    wanted = getattr(model_class, "config_class", None)
    for part in getattr(config, "sub_configs", {}):
        if wanted is not None and type(getattr(config, part, None)) is wanted:
            config = getattr(config, part)
    return config


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of `model_type` with a few narrow layers of each kind, and `changes`."""
    return shrunk(default_config(model_type), **changes)


def shrunk(config: Any, **changes: Any) -> Any:
    """A narrow config of the type of `config`, whose own fields are its default ones."""
    held = config.to_dict()
    special = SPECIAL.get(config.model_type, {})
    sizes: dict[str, Any] = {
        # Some configs refuse a float where they have an integer.
        name: int(size) if type(held[name]) is int and size == int(size) else size
        for name, size in SIZES.items()
        if type(held.get(name)) in (int, float) and held[name]
    }
    sizes |= {name: SIZES[name] for name in WANTED if name in held and held[name] is None}
    if "sliding_window" in held and held["sliding_window"] is None:
        sizes["sliding_window"] = None  # although its type may have one by default
    if isinstance(held.get("qk_rope_head_dim"), int):  # MLA
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    parts = {
        name: shrunk(part, **special.get(name, {})).to_dict()
        for name in getattr(config, "sub_configs", {})
        if hasattr(part := getattr(config, name, None), "to_dict")
    }
    rope = held.get("rope_parameters") or {}
    if "mrope_section" in rope:  # channels of each axis, which fill half a head
        half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        section = [half - 2 * (half // 3), half // 3, half // 3]
        sizes["rope_parameters"] = {**rope, "mrope_section": section}
    made = type(config)(**{**sizes, **special, **parts, **changes})
    if hasattr(made, "is_decoder") and not getattr(made, "is_encoder_decoder", False):
        made.is_decoder = True
    return made


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny random model in float32, with weights that make its attention peaked.

    Attention that ignores a window, a chunk, a sink, a softcap or a scale then shows in its logits.
    `changes` are fields of its config.
    """
    config = tiny_config(model_type, **changes)
    config._attn_implementation = "eager"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: nn.Module = class_of(model_type)._from_config(config).float().eval()
    sharpen(model, seed=seed)
    return model


def sharpen(model: nn.Module, *, seed: int = 0) -> None:
    """Draws a model's weights anew, so that scores spread and every part of it counts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float32)
            path = name.lower().split(".")
            if weight.ndim == 1 and any(part in path for part in _NORMS):
                weight.add_(1 + 0.1 * noise)
            elif weight.ndim == 1 and "norm" in name.lower():
                weight.add_(0.1 * noise)
            elif any("sink" in part for part in path):
                weight.copy_(1 + noise)
            elif weight.ndim >= 2:
                width = 0.6 / math.sqrt(max(weight.shape[-1], 1)) + 0.02
                if any(key in part for key in _SCORES for part in path[-3:]):
                    width *= 2.5
                elif "embed" in name.lower() or "wte" in path:
                    width = 1.0
                weight.copy_(width * noise)
            else:
                weight.copy_(0.3 * noise)
