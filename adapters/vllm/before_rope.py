"""Keys before RoPE, kept where a layer's attention finds them.

An operator of its own, so that a compiled model neither traces the buffer nor drops the copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._extras import extra

with extra("vllm"):
    from vllm.forward_context import get_forward_context


@torch.library.custom_op("kvpolicy::keep_key", mutates_args=())
def keep_key(key: Tensor, layer_name: str) -> Tensor:
    """A copy of `key` `[T, Hkv * D]`, after another one went to the buffer that a layer names."""
    buffer = get_forward_context().no_compile_layers[layer_name].impl.key_pre
    buffer[: len(key)].copy_(key)
    return key.clone()


@keep_key.register_fake
def _(key: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(key)


class BeforeRope(nn.Module):
    """A rotary embedding whose keys are kept before they are rotated, maybe in place."""

    def __init__(self, rotary: nn.Module, layer_name: str) -> None:
        super().__init__()
        self.rotary, self.layer_name = rotary, layer_name

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> Any:
        kept = torch.ops.kvpolicy.keep_key(key.reshape(len(key), -1), self.layer_name)
        return self.rotary(positions, query, kept.view(key.shape))
