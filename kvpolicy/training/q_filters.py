"""Filters of Q-Filters for a model: the direction that each head's queries share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.hf.models import attention_layers
from ..adapters.hf.training import Attended, attach_for_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def fit_q_filters(model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """Filters `[L, Hkv, D]` for `QFilters`, fp32 on the CPU.

    Of each query head the first right singular vector of its queries after RoPE, its sign such
    that their mean lies along it; a KV head's filter is minus the mean over its group. Nothing is
    centred. Texts are read one after another and only second moments are kept.

    Args:
        model: with nothing attached; its layers attend to all tokens.
        texts: token ids `[N]`.

    Raises:
        ValueError: no text, or a layer slides.
        UnsupportedError: the adapter does not serve the model.

    Source: Godey et al., 2025; NVIDIA/kvpress, `qfilter_press.py`, for the sign.
    """
    if not texts:
        raise ValueError("texts: wanted one or more, got none")
    layers = attention_layers(model)
    if any(layer.window is not None for layer in layers):
        raise ValueError("model: wanted layers that attend to all tokens, got one that slides")
    moments: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}
    groups: dict[int, int] = {}

    def look(attended: Attended) -> Tensor:
        query = attended.query[0].double()
        layer = attended.layer
        moments[layer] = moments.get(layer, 0) + query.mT @ query
        means[layer] = means.get(layer, 0) + query.sum(1)
        groups[layer] = query.shape[0] // attended.key.shape[1]
        return attended.dense()

    with attach_for_training(model, checkpointing=False) as attached:
        for ids in texts:
            attached.hidden(ids.to(model.device)[None], look)
    found = []
    for layer in range(len(layers)):
        first = torch.linalg.eigh(moments[layer])[1][..., -1]  # eigenvalues ascend
        along = (first * means[layer]).sum(-1, keepdim=True)
        first = torch.where(along < 0, -first, first)
        found.append(-first.view(-1, groups[layer], first.shape[-1]).mean(1))
    return torch.stack(found).float().cpu()
