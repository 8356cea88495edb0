"""Runs an unmodified transformers model as teacher or gated student.

Public extension points only: a registered attention function and forward hooks where keys before
RoPE come from. What it serves, and where that is, `models` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from .models import attention_layers, decoder_of, key_source
from .wrappers import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "kvpolicy_training"  # unregistered as a mask function: batches carry no padding
_SLOT = "_kvpolicy_training"


class AttentionRule(Protocol):
    """What attention computes while a model is attached."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, key_pre: Tensor, scale: float
    ) -> Tensor:
        """`[B, H, N, D]` of query `[B, H, N, D]` and three `[B, Hkv, N, D]`."""


class _Layer:
    """Stash of one attention module between its key projection and its attention call."""

    def __init__(self, window: int | None) -> None:
        self.window = window  # of a layer that only slides
        self.rule: AttentionRule | None = None
        self.key_pre: Tensor | None = None


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention with grouped KV heads; the teacher."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    layer: _Layer = getattr(module, _SLOT)
    key_pre, layer.key_pre = layer.key_pre, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer.window is not None:  # nothing far to gate: rules do not apply
        out = _sliding(query, key, value, scale, layer.window)
    elif layer.rule is None:
        out = dense_attention(query, key, value, scale)
    else:
        assert key_pre is not None
        pre = key_pre.view(*key_pre.shape[:2], -1, key.shape[-1]).transpose(1, 2)
        out = layer.rule(cast(int, module.layer_idx), query, key, value, pre, scale)
    return out.transpose(1, 2).contiguous(), None


def _sliding(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )


class AttachedModel:
    """A frozen model whose attention can be given a rule for one forward."""

    def __init__(self, decoder: nn.Module, layers: list[_Layer]) -> None:
        self._decoder, self._layers = decoder, layers

    def hidden(self, input_ids: Tensor, rule: AttentionRule | None = None) -> Tensor:
        """Final normed hidden states `[B, N, hidden]`; without a rule, those of the teacher.

        A backward pass with activation checkpointing recomputes layers, so the rule of the last
        forward stays until the next one.
        """
        for layer in self._layers:
            layer.rule, layer.key_pre = rule, None
        device = input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return self._decoder(input_ids, use_cache=False).last_hidden_state


@contextmanager
def attach_for_training(
    model: PreTrainedModel, *, checkpointing: bool = True
) -> Iterator[AttachedModel]:
    """Freeze a model, install the training attention and undo everything on exit.

    Args:
        model: a causal language model that the adapter serves.
        checkpointing: recompute each layer's activations in the backward pass.

    Raises:
        UnsupportedError: the adapter does not serve the model.
    """
    known = attention_layers(model)
    base, decoder = base_of(model), decoder_of(model)
    AttentionInterface.register(NAME, _attention)
    implementation, was_training = base.config._attn_implementation, model.training
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    layers = [_Layer(layer.window) for layer in known]
    with ExitStack() as undo:
        undo.callback(model.train, was_training)
        undo.callback(base.set_attn_implementation, implementation)
        for parameter, flag in frozen:
            undo.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for module, layer in zip([x.module for x in known], layers, strict=True):
            undo.callback(key_source(module).register_forward_hook(_stash(layer)).remove)
            setattr(module, _SLOT, layer)
            undo.callback(delattr, module, _SLOT)
        if checkpointing:
            for decoder_layer in decoder.layers:
                _checkpoint(decoder_layer)
                undo.callback(delattr, decoder_layer, "forward")
        model.eval()
        base.set_attn_implementation(NAME)
        yield AttachedModel(decoder, layers)


def _checkpoint(layer: nn.Module) -> None:
    # transformers' own switch needs training mode and changed its name; this is all it does.
    layer.forward = partial(
        checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
    )


def _stash(layer: _Layer) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        layer.key_pre = output

    return hook
