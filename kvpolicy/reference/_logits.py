"""Attention logits."""

from __future__ import annotations

import torch
from torch import Tensor


def logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """q.k * scale `[..., M, N]` of queries `[..., M, D]` and keys `[..., N, D]`; float32 at least.

    A product is rounded to the operands' dtype. Float16 is widened first: q.k may exceed its range
    where the logit does not.
    """
    query, key = widened(query), widened(key)
    found = query @ key.transpose(-1, -2)
    return found.to(torch.promote_types(found.dtype, torch.float32)).mul_(scale)


def widened(x: Tensor) -> Tensor:
    """Float16 as float32, anything else as it is."""
    return x.float() if x.dtype == torch.float16 else x
