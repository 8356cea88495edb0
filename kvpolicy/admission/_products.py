"""Functions of tokens that are the same whatever tokens stand beside them, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # tokens that are computed together; products of other shapes are rounded otherwise


def by_tile(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` `[64, n]` -> `[64, m]` of tokens `[T, n]`, always of as many at once: `[T, m]`.

    What a policy says of a token when it is written does not depend on the call it comes in.
    """
    tiles = F.pad(x, (0, 0, 0, -len(x) % TILE)).unflatten(0, (-1, TILE))
    return torch.cat([function(tile) for tile in tiles.unbind(0)])[: len(x)]
