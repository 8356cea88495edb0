"""What the last queries of a prompt weigh: tokens, and distances back from a query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._prompt import PromptView


def last_weights(view: PromptView, count: int, kv_head: int) -> Tensor:
    """Attention weights `[G, n, N]` of the last n = up to `count` queries of a KV head's group.

    In float32 at least; zeros where a query sees no token.
    """
    each, end = view.query.shape[0] // view.keys.shape[0], view.keys.shape[1]
    dtype = torch.promote_types(view.keys.dtype, torch.float32)
    query = view.query[kv_head * each : (kv_head + 1) * each, -count:].to(dtype)
    logits = query @ view.keys[kv_head].to(dtype).T * view.scale
    if view.softcap is not None:
        logits = view.softcap * (logits / view.softcap).tanh()
    at = torch.arange(end, device=logits.device)
    seen = (at <= at[end - query.shape[1] :, None]) & view.present[kv_head]
    return logits.masked_fill_(~seen, float("-inf")).softmax(-1).masked_fill_(~seen, 0)


def along_diagonals(weights: Tensor) -> Tensor:
    """Sums `[..., N]` of `[..., n, N]` over what lies as far back from each query.

    Entry x is for the distance N - 1 - x.
    """
    *rest, n, width = weights.shape
    padded = F.pad(weights, (n - 1, 0)).flatten(-2)  # row i starts at i * (width + n - 1)
    shape, step = (*rest, n, width), width + n - 1
    outer = padded.stride()[:-1]
    return padded.as_strided(shape, (*outer, step + 1, 1)).sum(-2)


def best(scores: Tensor, count: int | Tensor) -> Tensor:
    """Marks the best `count` of `[..., N]`, or `[...]` of each row; ties keep the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    taken = rank < (count[..., None] if isinstance(count, Tensor) else count)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, taken.expand(order.shape))


def by_distance(distances: Tensor, tiles: range) -> Tensor:
    """Blocks `[..., N, M]` that lie a marked number `[..., M']` of blocks before a tile."""
    block = torch.arange(tiles.stop, device=distances.device)
    back = block[tiles.start :, None] - block
    inside = back.clamp(0, distances.shape[-1] - 1)
    return distances[..., inside] & (back >= 0) & (back < distances.shape[-1])
