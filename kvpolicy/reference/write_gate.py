"""The write gate of WG-KV: a small MLP per KV head on normalised keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6
TILE = 16  # tokens of a product
VECTOR = 32  # what channels and hidden units are padded to


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
    """Gate scores of tokens `[Hkv, T]`, or decisions about them: `Ops.write_gate`.

    Products have one shape, of whole vectors, for 1 and for 4096 tokens: others are rounded by
    shape, and at their edges by place. So are torch's own GELU and sigmoid, but not erf and exp.
    """
    heads, tokens, dim = key.shape
    wide = torch.promote_types(w1.dtype, torch.float32)
    x = torch.cat([_norm(key_pre, norm_pre), _norm(key, norm_post)], -1).to(w1.dtype)
    channels, units = -2 * dim % VECTOR, -w1.shape[1] % VECTOR  # of padding
    tiles = F.pad(x, (0, channels, 0, -tokens % TILE)).unflatten(1, (-1, TILE))
    if channels or units:
        w1 = F.pad(w1, (0, channels, 0, units))
        b1, w2 = (F.pad(x, (0, units)) for x in (b1, w2))
    w = w1.to(wide).transpose(1, 2)  # [Hkv, 2D, m]
    bias, last = (x.to(wide)[:, None] for x in (b1, w2))  # [Hkv, 1, m]
    logit = key.new_empty(heads, tiles.shape[1], TILE, dtype=wide)
    for number, tile in enumerate(tiles.unbind(1)):
        hidden = torch.bmm(tile.to(wide).contiguous(), w) + bias
        hidden = _silu(hidden) if silu else _gelu(hidden)
        logit[:, number] = (hidden * last).sum(-1)
    logit = logit.flatten(1)[:, :tokens] + b2.to(wide)[:, None]
    scores = (1 / (1 + (-logit).exp())).to(key.dtype)
    if limit is None:
        return scores
    return scores >= limit if inclusive else scores > limit


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return weight * normed.to(x.dtype)
