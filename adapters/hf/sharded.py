"""Hidden states of a model whose weights ranks hold in parts (`fully_shard`)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def through_root(root: nn.Module, decoder: nn.Module, input_ids: Tensor) -> Tensor:
    """The final hidden states `[B, N, hidden]` of `decoder`, whose outermost model is `root`.

    Hooks of every model that was sharded gather its weights where it is called, and again in the
    backward pass where gradients reach its output. So the whole model runs, with one position's
    logits, and these take part in the backward pass with gradients of 0.
    """
    seen: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    few = "logits_to_keep" in inspect.signature(root.forward).parameters
    try:
        output = root(input_ids, use_cache=False, **({"logits_to_keep": 1} if few else {}))
    finally:
        hook.remove()
    logits = getattr(output, "logits", None)
    if logits is None or not logits.requires_grad:
        return seen[-1]
    joined: Tensor = _Joined.apply(seen[-1], logits)  # type: ignore[no-untyped-call]
    return joined


class _Joined(torch.autograd.Function):
    """The first input; the second one's gradient is 0."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.like = second.shape, second.dtype, second.device
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)
