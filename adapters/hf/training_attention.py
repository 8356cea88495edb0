"""Attention that can be trained against: with softcap, sinks, and a bias on what queries see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 512  # queries whose scores are held at a time

# Of the distances i - j `[R, N]` between a tile's queries and all keys before its end: what is
# added to the scores, broadcast to `[B, H, R, N]`; -inf hides.
Bias = Callable[[Tensor], Tensor]


def causal(distance: Tensor) -> Tensor:
    """The bias that hides later keys."""
    return torch.zeros_like(distance, dtype=torch.float32).masked_fill(distance < 0, -torch.inf)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Bias = causal,
) -> Tensor:
    """Attention `[B, H, N, Dv]` of `query` `[B, H, N, D]` with `key` and `value` `[B, Hkv, N, D]`.

    `softcap` bounds scores before the bias is added; `sinks` `[H]` are logits that join the
    softmax. Scores are held for a tile of queries at a time, and computed anew for gradients.
    """
    tiles = []
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        given = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
        rest: Any = (scale, softcap, sinks, bias, start)
        if torch.is_grad_enabled() and length > TILE:
            tiles.append(checkpoint(_tile, *given, *rest, use_reentrant=False))
        else:
            tiles.append(_tile(*given, *rest))
    return torch.cat(tiles, 2)


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Bias,
    start: int,
) -> Tensor:
    logits = (query @ key.mT) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    at = torch.arange(key.shape[2], device=key.device)
    logits = logits + bias(at[start:, None] - at).to(logits.dtype)
    if sinks is not None:
        column = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)
    weights = weights[..., :-1] if sinks is not None else weights
    return weights.to(value.dtype) @ value


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention with grouped KV heads; the teacher."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    return attend(query, key, value, scale=scale, softcap=softcap, sinks=sinks)


def sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    window: int,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention to `window` keys, itself included, and to none of an earlier chunk."""
    if softcap is None and sinks is None:
        at = torch.arange(query.shape[2], device=query.device)
        mask = _sees(at[:, None], at, window, chunk)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    def bias(distance: Tensor) -> Tensor:
        keys = torch.arange(distance.shape[1], device=distance.device)
        seen = _sees(keys + distance, keys, window, chunk)
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)

    return attend(query, key, value, scale=scale, softcap=softcap, sinks=sinks, bias=bias)


def _sees(query: Tensor, key: Tensor, window: int, chunk: int | None) -> Tensor:
    seen = (query - key >= 0) & (query - key < window)
    return seen if chunk is None else seen & (query // chunk == key // chunk)
