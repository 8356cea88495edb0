"""The write gate of WG-KV: a small MLP per KV head on normalised keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6
TILE = 16  # tokens; one shape for 1 and for 4096 tokens, so that a score never depends on the cut


def write_gate(
    key_pre: Tensor,
    key: Tensor,
    norm_pre: Tensor,
    norm_post: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    limit: float | None = None,
    inclusive: bool = False,
    silu: bool = False,
) -> Tensor:
    """Gate scores of tokens `[Hkv, T]`, or decisions about them: `Ops.write_gate`."""
    heads, tokens, dim = key.shape
    x = torch.cat([_norm(key_pre, norm_pre), _norm(key, norm_post)], -1)
    pad = -tokens % TILE
    x = F.pad(x, (0, 0, 0, pad)).view(heads, -1, TILE, 2 * dim).to(w1.dtype)
    tiles = x.shape[1]
    w = w1[:, None].expand(-1, tiles, -1, -1).transpose(2, 3)
    hidden = torch.matmul(x, w) + b1[:, None, None]
    hidden = F.silu(hidden) if silu else F.gelu(hidden)
    logit = (hidden * w2[:, None, None]).sum(-1) + b2[:, None, None]
    scores = logit.sigmoid().flatten(1)[:, :tokens].to(key.dtype)
    if limit is None:
        return scores
    return scores >= limit if inclusive else scores > limit


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return weight * normed.to(x.dtype)
