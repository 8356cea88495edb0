"""What the last queries look at, from a view."""

from __future__ import annotations

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
    return ops.window_masses(
        stored.pages, stored.heads, stored.ring, stored.queries, stored.lengths, stored.window,
        stored.scale, observation=observation, squared=squared, softcap=stored.softcap,
        sinks=stored.sinks,
    )  # fmt: skip


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
