"""The model inside the wrappers that other libraries put around it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..._fields import shown
from ...errors import UnsupportedError

# By name: importing what defines them takes long, and most are never used.
REPLICAS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
)
READY_STATES = ("PREFIX_TUNING", "CARTRIDGE")  # of PEFT: they fill caches before the prompt


def unwrapped(model: Any) -> Any:
    """`model` without torch.compile's wrapper, which writes its attributes to the model inside.

    Raises UnsupportedError for wrappers that run replicas or shards of a model.
    """
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for name in REPLICAS:
        if name in kinds:
            raise UnsupportedError(
                f"model: {name} runs replicas or shards of a model, an attached model runs once; "
                "attach to the model itself"
            )
    return model


def fully_sharded(model: Any) -> bool:
    """Whether `fully_shard` splits weights of the model over ranks, which it gathers by hooks."""
    return any(
        kind.__name__ == "FSDPModule"
        for module in base_of(model).modules()
        for kind in type(module).__mro__
    )


def base_of(model: Any) -> Any:
    """transformers' model inside the wrappers of PEFT and torch.compile."""
    model = unwrapped(model)
    return base_of(model.get_base_model()) if hasattr(model, "get_base_model") else model


def soft_prompt(model: Any) -> Any:
    """The active PEFT configuration if it puts virtual tokens before prompts, else None."""
    config = getattr(unwrapped(model), "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def check_soft_prompt(model: Any) -> None:
    """Raises UnsupportedError for soft prompts that are keys and values instead of tokens."""
    config = soft_prompt(model)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    if kind in READY_STATES:
        raise UnsupportedError(
            f"peft_type {kind}: the adapter hands ready keys and values to the model, which a "
            "pipeline's cache cannot judge; use prompt tuning, p-tuning or LoRA"
        )


def decoder_of(model: Any) -> Any:
    """The decoder stack of a language model, through wrappers and around other modalities."""
    _check_model(model)
    found = base_of(model)
    while hasattr(found, "get_decoder"):
        inner = base_of(found.get_decoder())
        if not hasattr(inner, "config"):  # a head of that name
            inner = base_of(found.base_model)
        if inner is found:  # also where its prefix names no module, as Llama 4's
            inner = getattr(found, "model", found)
        if inner is found or not isinstance(inner, nn.Module):
            break
        found = inner
    return found


def check_decoder(model: nn.Module, attached: nn.Module) -> None:
    """Raises UnsupportedError where a model's decoder is no longer the one that was `attached`."""
    found = decoder_of(model)
    if found is not attached and not any(x is attached for x in found.modules()):
        raise UnsupportedError(
            f"layers: the decoder of {type(model).__name__} was replaced while attached; detach, "
            "change the model, attach again"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(base_of(model), "config"):
        hint = f"; load it: AutoModelForCausalLM.from_pretrained({model!r})"
        raise TypeError(
            f"model: wanted a model of transformers, got {shown(model)}"
            + (hint if isinstance(model, str) else "")
        )


def takes_positions(model: Any) -> bool:
    """Whether the decoder is told positions; one that is not counts the columns of its cache."""
    return "position_ids" in inspect.signature(type(decoder_of(model)).forward).parameters
