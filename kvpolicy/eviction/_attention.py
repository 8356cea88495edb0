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
    """What `dense_masses` gives, from pages; of the stored tokens in float32 at least."""
    assert stored.queries is not None
    far, near = ops.window_masses(
        stored.pages, stored.heads, stored.ring, stored.queries, stored.lengths, stored.window,
        stored.scale, observation=observation, squared=squared, softcap=stored.softcap,
        sinks=stored.sinks,
    )  # fmt: skip
    return far, near.sum(-1, dtype=torch.float64)


def dense_masses(view: EvictionView, squared: bool = False) -> tuple[Tensor, Tensor]:
    """What `attention` gives, or its square if `squared`, summed over a group's heads and queries.

    Of the stored tokens `[B, Hkv, N]`, and of the window as a whole `[B, Hkv]`, in float64.
    """
    far = torch.zeros(view.valid.shape, dtype=torch.float64, device=view.valid.device)
    near = far.new_zeros(far.shape[:2])
    for row, used in enumerate(view.used):
        weights = attention(view, row, used).double()
        mass = (weights.square() if squared else weights).sum((1, 2))  # [Hkv, used + W]
        far[row, :, :used], near[row] = mass[:, :used], mass[:, used:].sum(-1)
    return far, near


def sums(view: EvictionView, x: Tensor) -> Tensor:
    """Sums `[..., B, Hkv]` of what the stored tokens have, `x` `[..., B, Hkv, N]`, in float64.

    Sequence by sequence, as long as each is: how a sum is rounded depends on its length.
    """
    found = [
        x[..., row, :, :used].sum(-1, dtype=torch.float64) for row, used in enumerate(view.used)
    ]
    return torch.stack(found, -2)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
