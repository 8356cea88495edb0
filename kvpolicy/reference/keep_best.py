"""The best tokens of each head."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_best(scores: Tensor, valid: Tensor, amount: Tensor) -> Tensor:
    """Marks the `amount` `[...]` best valid tokens of each head `[..., N]`: `Ops.keep_best`."""
    length = scores.shape[-1]
    if length == 0:
        return valid.clone()
    amount = amount.minimum(valid.sum(-1))[..., None]
    worst = scores.masked_fill(~valid, float("-inf"))
    # The score of the last token that stays; those above it stay, and the latest of its equals.
    ordered = worst.sort(dim=-1, descending=True).values
    border = ordered.gather(-1, (amount - 1).clamp(min=0).expand(*scores.shape[:-1], 1))
    above = (worst > border) & valid
    equal = (worst == border) & valid
    later = equal.int().flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # equals from here on
    stays = equal & (later <= amount - above.sum(-1, keepdim=True))
    return above | stays
