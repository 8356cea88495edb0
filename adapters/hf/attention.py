"""Our attention function: from transformers' layout to the pipeline's and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import UnsupportedError
from .arguments import check_attention
from .compile import PLACE, attend
from .faces import NAME, KVRef
from .models import key_source

PRE = "_kvpolicy_pre_rope"  # left by a hook on the module whose output are keys before RoPE
HIDDEN = "_kvpolicy_hidden"  # left on the attention module


def keep_pre(module: nn.Module, args: Any, output: Tensor) -> None:
    """Forward hook of `key_source`."""
    module.__dict__[PRE] = output


def keep_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module."""
    module.__dict__[HIDDEN] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def forget_kept(module: Any) -> None:
    """Drops what hooks left for an attention call that never came."""
    _take(key_source(module), PRE)
    _take(module, HIDDEN)


def _take(module: nn.Module, name: str) -> Tensor | None:
    """What a hook left, written so that dynamo traces it."""
    found = getattr(module, name, None)
    if found is not None:
        delattr(module, name)
    return found


def attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: `query` `[B, Hq, S, D]`, output `[B, S, Hq, D]`."""
    pre, hidden = _take(key_source(module), PRE), _take(module, HIDDEN)
    if not isinstance(key, KVRef):
        raise UnsupportedError(
            "attention without a pipeline cache: this model's config says attention 'kvpolicy' but "
            "nothing is attached to it; if it shares its config object with an attached model, "
            "build it from a copy of that config"
        )
    check_attention(module, scaling, dropout, kwargs)
    if torch.compiler.is_compiling() and hasattr(module, PLACE):
        return attend(getattr(module, PLACE), query, key.key, key.value, pre, hidden), None
    out = _attend(key, module.layer_idx, query, pre, hidden)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]
    return out, None


# Not traced where the whole model is compiled: a cache is no part of a graph.
@torch.compiler.disable
def _attend(
    handle: KVRef, layer: int, query: Tensor, pre: Tensor | None, hidden: Tensor | None
) -> Tensor:
    return handle.cache.attend(layer, query, handle.key, handle.value, pre, hidden)


class _NoGradient(torch.autograd.Function):
    """Makes a backward pass through a cache raise where it would silently miss the attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "backward: an attached model serves inference only; detach it to compute gradients"
        )


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The registered mask function: padding is read from the 2D mask by the decoder's hook."""


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, no_mask)
