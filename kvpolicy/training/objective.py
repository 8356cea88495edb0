"""What a write gate is trained on: gated attention, a memory regulariser and distillation.

Source: WG-KV (EMCLab-Sinica/WG-KV), `src/modeling_layers.py` and `scripts/train.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapters.hf.training_attention import attend

Kernel = Literal["auto", "dense", "flex", "flash"]

# Closed gates in hard mode. Finite, so that no kernel meets 0 * inf; exp(-1e4) is 0 in fp32.
CLOSED = -1e4


def log_gate(gate: Tensor, threshold: float | None = None) -> Tensor:
    """Bias of a gate on the logits of far queries: ln g, or ln [g > threshold] when given."""
    if threshold is None:
        return gate.log()
    return torch.zeros_like(gate).masked_fill(gate <= threshold, CLOSED)


def choose_kernel(device: torch.device, head_dim: int, softcap: float | None = None) -> Kernel:
    """The fastest kernel that serves a device, a head_dim and a softcap."""
    if device.type != "cuda":
        return "dense"
    return "flash" if head_dim % 8 == 0 and head_dim < 256 and softcap is None else "flex"


def ungate(gate: Tensor, count: int, seed: int) -> Tensor:
    """Opens `count` random positions of each row of `gate` `[..., N]`, the same for one seed.

    Source: WG-KV, `g_ungate_count`.
    """
    if not 0 <= count <= gate.shape[-1]:
        raise ValueError(f"ungate: wanted 0 to {gate.shape[-1]} positions, got {count}")
    if count == 0:
        return gate
    generator = torch.Generator(gate.device).manual_seed(seed)
    order = torch.rand(gate.shape, generator=generator, device=gate.device)
    return gate.scatter(-1, order.topk(count).indices, 1.0)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Causal attention over a_ij = s_ij + [i - j >= window] ln g_j.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, Hkv, N, D]`, after RoPE.
        value: `[B, Hkv, N, Dv]`.
        log_gate: `[B, Hkv, N]` fp32; gradients flow to it.
        window: keys with i - j < window, the token itself included, are never biased.
        scale: factor of the dot products, usually D ** -0.5.
        softcap: c of s_ij = c tanh(scale q.k / c), or None.
        sinks: logits `[H]` that join the softmax, or None; they get no gradient.
        kernel: "dense" holds the bias `[B, H, N, N]`, or with softcap or sinks that of a tile of
            queries; "flex" compiles FlexAttention (CUDA); "flash" merges two FlashAttention calls
            (CUDA, bf16 or fp16, no softcap); "auto" is `choose_kernel`.

    Returns:
        `[B, H, N, Dv]`.
    """
    if window < 1:
        raise ValueError(f"window: wanted at least 1, got {window}")
    # Under autocast RoPE may leave queries and keys in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if kernel == "auto":
        kernel = choose_kernel(query.device, query.shape[-1], softcap)
    if kernel == "dense":
        if softcap is None and sinks is None:
            return _dense(query, key, value, log_gate, window, scale)
        group = query.shape[1] // key.shape[1]
        bias = partial(_far_bias, log_gate.repeat_interleave(group, 1), window)
        return attend(query, key, value, scale=scale, softcap=softcap, sinks=sinks, bias=bias)
    if kernel == "flex":
        blocks = _causal_blocks(query.shape[2], query.device)
        given = query, key, value, log_gate, window, scale, blocks
        return _compiled_flex()(*given, softcap, sinks)
    if kernel == "flash":
        from .flash import flash_gated

        if softcap is not None:
            raise ValueError(
                "kernel: FlashAttention gives no gradients with a softcap, which this model has; "
                "write kernel='auto', 'flex' or 'dense'"
            )
        return flash_gated(query, key, value, log_gate, window=window, scale=scale, sinks=sinks)
    raise ValueError(f"kernel: wanted one of 'auto', 'dense', 'flex', 'flash', got {kernel!r}")


def _far_bias(log_gate: Tensor, window: int, distance: Tensor) -> Tensor:
    """`[B, H, R, N]` of a tile's distances: ln g far away, and what hides later keys."""
    part = log_gate[:, :, None, : distance.shape[1]] * (distance >= window)
    return part.masked_fill(distance < 0, float("-inf"))


def _dense(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, window: int, scale: float
) -> Tensor:
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    distance = _distance(length, query.device)
    bias = log_gate.to(query.dtype)[:, :, None, :] * (distance >= window)
    bias = bias.masked_fill(distance < 0, float("-inf")).repeat_interleave(group, dim=1)
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    # The memory-efficient kernel is the one fused kernel that returns the gradient of a bias.
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _distance(length: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return position[:, None] - position[None, :]


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    window: int,
    scale: float,
    blocks: object,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    group = query.shape[1] // key.shape[1]

    def far_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score + torch.where(i - j >= window, log_gate[b, h // group, j], 0.0)

    flex: Callable[..., Any] = flex_attention  # its overloads know literals only
    rules: dict[str, Any] = {
        "score_mod": far_bias,
        "block_mask": blocks,
        "scale": scale,
        "enable_gqa": True,
    }
    if sinks is None:
        out: Tensor = flex(query, key, value, **rules)
        return out
    out, lse = flex(query, key, value, **rules, return_lse=True)
    share = torch.sigmoid(lse.float() - sinks.float()[:, None])  # of all but the sink
    return (out * share[..., None]).to(out.dtype)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(_flex, dynamic=False)


@lru_cache(maxsize=8)
def _causal_blocks(length: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def memory_cost(gate: Tensor, window: int) -> Tensor:
    """Regulariser R: the share of far attention that open gates pay for.

    With o_s = min(1, window / (N - s)), the fraction of the queries after token s that see it
    locally, R is the mean of o_s + (1 - o_s) (1 - (1 - g_s)^2). Gates at 1 cost 1; closed gates
    cost the window only.

    Args:
        gate: `[..., N]` in [0, 1].
        window: tokens of the local window.

    Returns:
        Scalar, fp32.
    """
    length = gate.shape[-1]
    later = torch.arange(length, 0, -1, device=gate.device, dtype=torch.float32)
    local = (window / later).clamp(max=1.0)
    return (local + (1 - local) * (1 - (1 - gate.float()).square())).mean()


def kept_fraction(gate: Tensor, *, window: int, threshold: float) -> Tensor:
    """Share of N tokens in the cache at the end of a sequence: window + admitted tokens that left.

    Args:
        gate: `[..., N]`.
        window: tokens of the local window.
        threshold: a token is admitted if gate > threshold.

    Returns:
        `[...]`, fp32.
    """
    length = gate.shape[-1]
    left = max(length - window, 0)
    return ((gate[..., :left] > threshold).sum(-1) + min(length, window)).float() / length


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over batch, positions and channels of the final normed hidden states."""
    return F.mse_loss(student.float(), teacher.float())


def answer_loss(student: Tensor, teacher: Tensor, answers: Tensor) -> Tensor | None:
    """The same error where answers are predicted, each sequence that has an answer alike.

    Few tokens of a long sequence are answers, and the mean over all of them hardly sees a fact that
    was forgotten. Ours; the published loss has no such part.

    Args:
        student: `[B, N, C]`.
        teacher: `[B, N, C]`.
        answers: `[B, N]` bool, on the CPU: tokens that answer a question.

    Returns:
        Scalar, or None where no sequence has an answer.
    """
    rows = answers[:, 1:].any(1).nonzero().flatten().tolist()
    if not rows:
        return None
    # The state before a token predicts it.
    places = [answers[row, 1:].nonzero().flatten().to(student.device) for row in rows]
    losses = [
        distillation_loss(student[row, at], teacher[row, at])
        for row, at in zip(rows, places, strict=True)
    ]
    return torch.stack(losses).mean()
