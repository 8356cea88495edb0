"""Statistics of TriAttention for a model: the mean query of each head before RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.hf.asked import rope_of
from ..adapters.hf.models import attention_layers
from ..adapters.hf.training import Attended, attach_for_training
from ..rope import Rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def fit_triattention(
    model: PreTrainedModel, texts: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """`real`, `imaginary` and `size` `[L, Hq, D / 2]` for `TriAttention`, fp32 on the CPU.

    A pair of channels that RoPE turns together is a complex number; queries are turned back to
    position 0, then their mean and their mean absolute value are taken over all positions.

    Args:
        model: with nothing attached; its layers attend to all tokens and turn by RoPE.
        texts: token ids `[N]`.

    Raises:
        ValueError: no text, or a layer slides or has no RoPE.
        UnsupportedError: the adapter does not serve the model, or cannot tell how it turns.

    Source: Mao et al., 2026; WeianMao/triattention, `methods/pruning_utils.py`.
    """
    if not texts:
        raise ValueError("texts: wanted one or more, got none")
    layers = attention_layers(model)
    if any(layer.window is not None for layer in layers):
        raise ValueError("model: wanted layers that attend to all tokens, got one that slides")
    ropes: list[Rope] = []
    for index, layer in enumerate(layers):
        rope = rope_of(model, index, layer)
        if rope is None:
            raise ValueError(f"model: wanted layers with RoPE, got none in layer {index}")
        ropes.append(rope)
    means: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}

    def look(attended: Attended) -> Tensor:
        layer, query = attended.layer, attended.query[0].double()
        rope = ropes[layer]
        first, second, _ = rope.pairs(query)
        angle = rope.angles(torch.arange(query.shape[1], device=query.device))
        back = torch.polar(torch.full_like(angle, 1 / rope.factor), -angle)
        turned = torch.complex(first, second) * back  # [Hq, N, D / 2]
        means[layer] = means.get(layer, 0) + turned.sum(1)
        sizes[layer] = sizes.get(layer, 0) + turned.abs().sum(1)
        return attended.dense()

    with attach_for_training(model, checkpointing=False) as attached:
        for ids in texts:
            attached.hidden(ids.to(model.device)[None], look)
    count = sum(map(len, texts))
    mean = torch.stack([means[layer] for layer in range(len(layers))]).cpu() / count
    size = torch.stack([sizes[layer] for layer in range(len(layers))]).cpu() / count
    return mean.real.float(), mean.imag.float(), size.float()
