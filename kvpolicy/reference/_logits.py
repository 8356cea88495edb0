"""Attention logits, and attention where torch's own does not serve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(query: Tensor, key: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """q.k * scale `[..., M, N]` of queries `[..., M, D]` and keys `[..., N, D]`; float32 at least.

    A product is rounded to the operands' dtype. Float16 is widened first: q.k may exceed its range
    where the logit does not.
    """
    query, key = widened(query), widened(key)
    found = query @ key.transpose(-1, -2)
    found = found.to(torch.promote_types(found.dtype, torch.float32)).mul_(scale)
    return found if softcap is None else found.div_(softcap).tanh_().mul_(softcap)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of logits `[..., M, N]`, with one more logit in each sum: `sinks` `[..., M or 1]`."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores)[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention `[Hkv, G * T, Dv]` of queries `[Hkv, G * T, D]`, head after head of a group.

    Keys are `[Hkv, N, D]`, values `[Hkv, N, Dv]`; `seen` `[Hkv or 1, T, N]` is for all heads of a
    group. `softcap` and `sinks` `[Hq]` as in `kvpolicy.ops.Ops`.
    """
    kv_heads, rows = query.shape[:2]
    group = rows // seen.shape[1]
    mask = seen.repeat(1, group, 1)
    if softcap is None and sinks is None:
        given = query[None], key[None], value[None]
        return F.scaled_dot_product_attention(*given, attn_mask=mask[None], scale=scale)[0]
    if sinks is not None:
        sinks = sinks.view(kv_heads, group).repeat_interleave(seen.shape[1], 1)
    scores = logits(query, key, scale, softcap).masked_fill_(~mask, float("-inf"))
    weights = softmax(scores, sinks).to(value.dtype)
    return (widened(weights) @ widened(value)).to(query.dtype)


def widened(x: Tensor) -> Tensor:
    """Float16 as float32, anything else as it is."""
    return x.float() if x.dtype == torch.float16 else x
