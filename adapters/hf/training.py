"""Runs an unmodified transformers model as teacher or gated student.

Public extension points only: a registered attention function and forward hooks where keys before
RoPE come from. What it serves, and where that is, `models` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from ...errors import UnsupportedError
from .models import AttentionLayer, attention_layers, check_pre_rope, served
from .rule.pre_rope import keep_for, key_before_rope
from .wrappers import base_of, decoder_of

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

    def __init__(self, index: int, layer: AttentionLayer) -> None:
        self.index, self.window, self.chunk = index, layer.window, layer.chunk
        self.rule: AttentionRule | None = None
        self.pre_rope = layer.pre_rope
        self.kept: Any = None  # what its keys before RoPE are made from

    def keep(self, output: Any) -> None:
        self.kept = output

    def key_pre(self, key: Tensor) -> Tensor:
        kept, self.kept = self.kept, None
        assert self.pre_rope is not None
        return key_before_rope(self.pre_rope, key, kept)


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer.window is not None:  # nothing far to gate: rules do not apply
        out = _sliding(query, key, value, scale, layer)
    elif layer.rule is None:
        out = dense_attention(query, key, value, scale)
    else:
        pre = layer.key_pre(key)
        out = layer.rule(layer.index, query, key, value, pre, scale)
    return out.transpose(1, 2).contiguous(), None


def _sliding(query: Tensor, key: Tensor, value: Tensor, scale: float, layer: _Layer) -> Tensor:
    at = torch.arange(query.shape[2], device=query.device)
    distance = at[:, None] - at
    mask = (distance >= 0) & (distance < cast(int, layer.window))
    if layer.chunk is not None:
        mask &= at[:, None] // layer.chunk == at // layer.chunk
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )


def check_trains(model: nn.Module) -> None:
    """Raises UnsupportedError for a model whose attention cannot be trained against."""
    known = served(model)
    if known.readers or len(known.modules) != len(known.layers):
        raise UnsupportedError("model: its layers share keys or modules, which training does not")
    for index, layer in enumerate(known.layers):
        has = {"softcap": layer.softcap is not None, "sinks": bool(layer.sinks)}
        for name in (name for name, there in has.items() if there):
            raise UnsupportedError(
                f"model: layer {index} has {name}, which training's attention does not compute"
            )
    check_pre_rope(known)


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
            layer.rule, layer.kept = rule, None
        device = input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            states: Tensor = self._decoder(input_ids, use_cache=False).last_hidden_state
            return states


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
    check_trains(model)
    known = attention_layers(model)
    base, decoder = base_of(model), decoder_of(model)
    AttentionInterface.register(NAME, _attention)
    implementation, was_training = base.config._attn_implementation, model.training
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    layers = [_Layer(index, layer) for index, layer in enumerate(known)]
    with ExitStack() as undo:
        undo.callback(model.train, was_training)
        undo.callback(base.set_attn_implementation, implementation)
        for parameter, flag in frozen:
            undo.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for record, layer in zip(known, layers, strict=True):
            module, rule = record.module, record.pre_rope
            if rule is not None:
                for hook in keep_for(base, rule, module, layer.keep):
                    undo.callback(hook.remove)
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
