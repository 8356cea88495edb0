"""How many contexts a device reads together, and their tokens side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.hf import new_cache
from ...pipeline import CachePipeline
from ..sessions import look_back
from ..tasks.prompts import Example, Ids

_CPU_TOKENS = 1 << 13  # context tokens of a batch on the host
_ROOM = 24  # device memory for a context token, in units of its keys and values


def groups(
    model: PreTrainedModel, pipeline: CachePipeline, items: Sequence[Any]
) -> Iterator[list[Any]]:
    """As many contexts, or documents `[N]`, at a time as the device holds with their questions."""
    longest = max(len(x.context_ids) if isinstance(x, Example) else len(x) for x in items)
    count = at_a_time(model, pipeline, longest)
    for begin in range(0, len(items), count):
        yield list(items[begin : begin + count])


def at_a_time(model: PreTrainedModel, pipeline: CachePipeline, longest: int) -> int:
    """How many contexts of up to `longest` tokens the device holds with their questions."""
    if look_back.alone(pipeline.eviction):
        return 1
    spec = new_cache(model, pipeline).spec
    if spec.device.type == "cuda":
        each = 2 * spec.layers * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
        free, total = torch.cuda.mem_get_info(spec.device)
        used = torch.cuda.memory_allocated(spec.device)
        idle = torch.cuda.memory_reserved(spec.device) - used
        # Processes that share a device may be told their parts.
        own = torch.cuda.get_per_process_memory_fraction(spec.device) * total - used
        tokens = min(free + idle, own) // (_ROOM * each)
    else:
        tokens = _CPU_TOKENS
    return max(int(tokens) // longest, 1)


def block(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` of sequences padded on the left, and which of them are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    real = torch.tensor([[i >= width - len(row) for i in range(width)] for row in rows])
    return ids, real
