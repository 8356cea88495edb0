"""How many contexts a device reads together, and their tokens side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.hf import new_cache
from ...pipeline import CachePipeline
from ..sessions import look_back
from ..tasks.prompts import Ids

T = TypeVar("T")

_CPU_TOKENS = 1 << 13  # context tokens of a batch on the host
# How often a context token's keys and values are thought to be there: once, since copies for
# questions share pages, and the windows of the copies, growth and what a prompt writes beside.
_TIMES = 4
_LAYERS = 2  # whose activations are thought to be alive together


def in_groups(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    items: Sequence[Any],
    longest: int,
    read: Callable[[list[Any]], T],
) -> list[T]:
    """What `read` gives for groups of items: contexts or documents of up to `longest` tokens.

    Groups are as large as the device is thought to hold, all of about one size; where its memory
    runs out nonetheless, the rest is read in groups of half the size.

    Raises:
        torch.OutOfMemoryError: one item alone is too large.
    """
    most, left = at_a_time(model, pipeline, longest), list(items)
    found: list[T] = []
    while left:
        size = -(-len(left) // -(-len(left) // most))
        try:
            found.append(read(left[:size]))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            most = size // 2
        else:
            left = left[size:]
            continue
        # The error, and what its frames held, is gone only here.
        torch.cuda.empty_cache()
    return found


def at_a_time(model: PreTrainedModel, pipeline: CachePipeline, longest: int) -> int:
    """How many contexts of up to `longest` tokens the device holds with their questions."""
    if look_back.alone(pipeline.eviction):
        return 1
    spec = new_cache(model, pipeline).spec
    if spec.device.type == "cuda":
        each = _TIMES * 2 * spec.layers * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
        each += _LAYERS * _activations(model) * spec.dtype.itemsize
        free, total = torch.cuda.mem_get_info(spec.device)
        used = torch.cuda.memory_allocated(spec.device)
        idle = torch.cuda.memory_reserved(spec.device) - used
        # Processes that share a device may be told their parts.
        own = torch.cuda.get_per_process_memory_fraction(spec.device) * total - used
        tokens = min(free + idle, own) // each
    else:
        tokens = _CPU_TOKENS
    return max(int(tokens) // longest, 1)


def _activations(model: PreTrainedModel) -> int:
    """Numbers of a token that a layer makes: in its MLP, and beside it as wide as the model."""
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None)
    wide = 4 * config.hidden_size
    return 3 * max(inner if isinstance(inner, int) else 0, wide) + 6 * int(config.hidden_size)


def block(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` of sequences padded on the left, and which of them are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    real = torch.tensor([[i >= width - len(row) for i in range(width)] for row in rows])
    return ids, real
