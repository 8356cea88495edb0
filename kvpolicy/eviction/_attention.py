"""What the last queries look at, from a view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Ops
from ._view import EvictionView, StoredTokens


def attention(view: EvictionView, row: int, used: int, near: bool = True) -> Tensor:
    """Softmax weights `[Hkv, G, w, used + W]` of a sequence's last queries, 0 of those unseen.

    Over its first `used` slots and, if `near`, over the window too; without it `[Hkv, G, w, used]`.
    One sequence at a time, as long as it is: how a product or a sum is rounded depends on its
    length.
    """
    assert view.queries is not None and view.query_valid is not None
    kv_heads, w = view.keys.shape[1], view.queries.shape[2]
    q = view.queries[row].unflatten(0, (kv_heads, -1))  # [Hkv, G, w, D]
    keys, recent_keys = view.keys[row, :, :used], view.recent_keys[row]
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.dtype == torch.float16:  # q.k may exceed its range where the logit does not
        q, keys, recent_keys = q.float(), keys.float(), recent_keys.float()
    end = view.lengths[row]
    at = (end - w + torch.arange(w, device=q.device))[:, None]  # query positions [w, 1]
    logits = _capped((q @ keys[:, None].transpose(2, 3)).to(wide) * view.scale, view.softcap)
    ok = (view.valid[row, :, None, :used] & (view.positions[row, :, None, :used] <= at))[:, None]
    if near:
        recent = recent_keys.shape[1]
        more = (q @ recent_keys[:, None].transpose(2, 3)).to(wide) * view.scale
        key_at = end - recent + torch.arange(recent, device=q.device)
        seen = view.recent_valid[row] & (key_at <= at)  # [w, W]
        logits = torch.cat([logits, _capped(more, view.softcap)], -1)
        ok = torch.cat([ok, seen.expand(kv_heads, 1, -1, -1)], -1)
    logits = logits.masked_fill(~ok, float("-inf"))
    wanted = logits.shape[-1]
    if view.sinks is not None:
        sinks = view.sinks.to(logits).view(kv_heads, -1, 1, 1)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:3], 1)], -1)
    # A query without any key gives NaN, and a query not yet seen gives nothing.
    weights: Tensor = logits.softmax(-1).nan_to_num(0.0)[..., :wanted]
    return weights * view.query_valid[row, :, None]


def masses(
    ops: Ops, stored: StoredTokens, observation: int, squared: bool = False
) -> tuple[Tensor, Tensor]:
    """What `attention` gives, summed over a group's heads and queries; pages are not copied.

    Weights, or their squares if `squared`, of the stored tokens `[B, Hkv, N]` and of the window's
    `[B, Hkv, W]`.
    """
    assert stored.queries is not None
    view = stored.view()
    assert view.queries is not None and view.query_valid is not None
    given = (
        stored.pages, stored.heads, stored.ring, stored.queries, stored.lengths, stored.window,
        stored.scale,
    )  # fmt: skip
    asked: dict[str, Any] = {
        "observation": observation, "softcap": stored.softcap, "sinks": stored.sinks
    }  # fmt: skip
    far = ops.window_scores(
        *given, kernel=1, pooling="avg", group="mean", normalize="visible", squared=squared, **asked
    )
    seen = view.query_valid.sum(-1).clamp(min=1)[:, None, None]
    kv_heads, recent = view.recent_keys.shape[1:3]
    q, keys = view.queries.unflatten(1, (kv_heads, -1)), view.recent_keys[:, :, None]
    if q.dtype == torch.float16:
        q, keys = q.float(), keys.float()
    logits = (q @ keys.mT).to(far.dtype) * view.scale  # [B, Hkv, G, w, W]
    levels = ops.window_levels(*given, **asked).unflatten(1, (kv_heads, -1))[..., None]
    place = torch.arange(-max(recent, observation), 0, device=q.device)
    causal = place[-recent:] <= place[-observation:, None]
    ok = causal & (view.recent_valid[:, None] & view.query_valid[..., None])[:, None, None]
    near = (_capped(logits, view.softcap) - levels).masked_fill(~ok, float("-inf")).exp()
    near = near.square() if squared else near
    return far * (seen * q.shape[2]), near.sum((2, 3))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
