"""Gated attention as two FlashAttention calls, with nothing of size N x N.

A query's keys are split at the window. Near keys are a causal band. Far keys (i - j >= window)
are plain causal attention of queries shifted by the window, and their bias ln g_j is one more
channel of the key. The halves are merged by their log-sum-exp; giving each half's backward the
merged output and log-sum-exp yields the exact gradients, that of ln g included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError

_PAD = 8  # FlashAttention wants head_dim to be a multiple of 8


def flash_gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    *,
    window: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Gated attention of objective.gated_attention, on CUDA in bf16 or fp16, without softcap."""
    dim = value.shape[-1]
    if dim < query.shape[-1]:  # FlashAttention wants as many channels
        value = F.pad(value, (0, query.shape[-1] - dim))
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    out: Tensor = _FlashGated.apply(q, k, v, log_gate, window, scale, sinks)
    return out[..., :dim].transpose(1, 2)


class _FlashGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_gate: Tensor,
        window: int,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        out, lse, rng = flash_forward(q, k, v, scale, window)
        if q.shape[1] > window:
            far, far_lse, _ = flash_forward(*_far(q, k, v, log_gate, window, scale), scale, None)
            near, near_lse = out[:, window:], lse[:, :, window:]
            both = torch.logaddexp(near_lse, far_lse)
            w_near, w_far = (
                (part - both).exp().transpose(1, 2)[..., None] for part in (near_lse, far_lse)
            )
            merged = (near * w_near + far[..., : v.shape[-1]] * w_far).to(out.dtype)
            out = torch.cat([out[:, :window], merged], 1)
            lse = torch.cat([lse[:, :, :window], both], 2).contiguous()
        if sinks is not None:  # a part of the softmax whose value is zero
            both = torch.logaddexp(lse, sinks.to(lse)[:, None])
            out = (out * (lse - both).exp().transpose(1, 2)[..., None]).to(out.dtype)
            lse = both
        ctx.save_for_backward(q, k, v, log_gate, out, lse, *rng)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_gate, out, lse, *rng = ctx.saved_tensors
        window, scale, dim = ctx.window, ctx.scale, q.shape[-1]
        grad = grads[0].contiguous()
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, rng, scale, window)
        dgate = torch.zeros_like(log_gate)
        left = q.shape[1] - window
        if left > 0:
            fq, fk, fv = _far(q, k, v, log_gate, window, scale)
            wide = [F.pad(t[:, window:], (0, _PAD)) for t in (grad, out)]
            fdq, fdk, fdv = flash_backward(
                wide[0], fq, fk, fv, wide[1], lse[:, :, window:].contiguous(), rng, scale, None
            )
            dq[:, window:] += fdq[..., :dim]
            dk[:, :left] += fdk[..., :dim]
            dv[:, :left] += fdv[..., :dim]
            unit = scale * _bias_query(q.dtype, scale)
            dgate[..., :left] = fdk[..., dim].float().transpose(1, 2) / unit
        return dq, dk, dv, dgate, None, None, None


def _far(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries from `window` on and the keys they see far, with ln g as two more channels."""
    left = q.shape[1] - window
    one = _bias_query(q.dtype, scale)
    bias = log_gate[..., :left].float().transpose(1, 2)[..., None] / (scale * one)
    high = bias.to(k.dtype)
    low = (bias - high.float()).to(k.dtype)  # what the first channel rounds away
    zeros = (0, _PAD - 2)
    far_k = torch.cat([k[:, :left], F.pad(torch.cat([high, low], -1), zeros)], -1)
    ones = F.pad(q.new_full((*q[:, window:].shape[:-1], 2), one), zeros)
    return torch.cat([q[:, window:], ones], -1), far_k, F.pad(v[:, :left], (0, _PAD))


def _bias_query(dtype: torch.dtype, scale: float) -> float:
    """What a query holds in the bias channels: 1 / scale, as the dtype rounds it."""
    return torch.tensor(1 / scale, dtype=dtype).item()


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Causal attention, of i - j < window if given.

    Returns:
        Output `[B, N, H, D]`, log-sum-exp `[B, H, N]` fp32 and the (unused) dropout state.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        raise BackendError(
            f"kernel='flash': wanted bfloat16 or float16 on a CUDA device, got {q.dtype} on "
            f"{q.device}; write kernel='auto'"
        )
    length = q.shape[1]
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, length, length, 0.0, True, False, scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    return out, lse, (seed, offset)


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Sequence[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the given output and log-sum-exp."""
    length = q.shape[1]
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, length, length, 0.0, True, *rng,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
