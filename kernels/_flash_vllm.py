"""FlashAttention-3 as vLLM ships it, under the names and arguments of the other interfaces.

vLLM's own function takes no used lengths of queries; the op below it does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def present() -> bool:
    """Whether vLLM has loaded it in this process."""
    return hasattr(torch.ops._vllm_fa3_C, "fwd")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float,
    causal: bool = False,
    pack_gqa: bool | None = None,
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor] | Tensor:
    """Attention of packed sequences; with `return_attn_probs` also the log-sum-exps."""
    no_page, no_rotary, no_scale = (None,) * 3, (None,) * 3, (None,) * 3
    out, lse, *_ = torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, None, None,  # no new keys and values, no q_v, no out
        cu_seqlens_q, cu_seqlens_k, None, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        *no_page, *no_rotary, *no_scale, softmax_scale, causal,
        -1, -1, softcap,  # no window
        True, None, 1, pack_gqa, 0, None,  # one split, no sinks
        1, 0, None,  # one rank
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, softcap: float = 0.0
) -> Tensor:
    """Attention of `[B, T, H, D]`."""
    out = flash_attn_varlen_func(
        q, k, v, None, None, None, None, softmax_scale=softmax_scale, causal=causal,
        softcap=softcap,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out
