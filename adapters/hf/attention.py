"""Our attention function: from transformers' layout to the pipeline's and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import PhaseError, UnsupportedError
from .cache import NAME, KVRef

PRE = "_kvpolicy_pre_rope"  # left on the attention module between hook and attention call
HIDDEN = "_kvpolicy_hidden"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: `query` `[B, Hq, S, D]`, output `[B, S, Hq, D]`."""
    pre, hidden = module.__dict__.pop(PRE, None), module.__dict__.pop(HIDDEN, None)
    if not isinstance(key, KVRef):
        raise UnsupportedError(
            "attention without a pipeline cache: this model's config says attention 'kvpolicy' but "
            "nothing is attached to it; if it shares its config object with an attached model, "
            "build it from a copy of that config"
        )
    cache = key.cache
    state, plan = cache.state, cache.plan
    if plan is None or state is None:
        raise PhaseError("attention outside a forward of the attached model's decoder")
    batch, _, columns, dim = query.shape
    kv_heads = key.key.shape[1]
    if pre is not None:
        pre = pre.view(batch, columns, kv_heads, dim).transpose(1, 2)
    with torch.no_grad():
        out = plan.attend(cache.pipeline, state, key.layer, query, key.key, key.value, pre, hidden)
    out = out.transpose(1, 2).contiguous()
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)
    return out, None


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
