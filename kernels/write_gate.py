"""The write gate of WG-KV: a small MLP per KV head on normalised keys.

A token's score depends on nothing but the token: tiles have one shape and hidden units are summed
chunk by chunk in one order, whether a call holds 1 token or 4096. Few tokens spread their chunks
over programs of the same binary; a second kernel adds the chunks up and, where asked, decides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, check_dtype, dot_size, on, processors
from ._math import dot, narrow

_NORM_EPS = 1e-6
_FINISH = 256  # tokens that one program of the second kernel finishes


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
    """Gate scores `[Hkv, T]`, or decisions where a limit is given; see the reference."""
    check_dtype("write_gate", "key", key)
    check_dtype("write_gate", "w1", w1)
    heads, tokens, dim = key.shape
    hidden = w1.shape[1]
    kind = key.dtype if limit is None else torch.bool
    out = torch.empty(heads, tokens, dtype=kind, device=key.device)
    if tokens == 0:
        return out
    w1, b1, w2, b2 = (x.contiguous() for x in (w1, b1, w2, b2))
    key_pre, key = _aligned(key_pre), _aligned(key)
    rows, units, warps = _tile(dot_size(dim), max(key.element_size(), w1.element_size()))
    chunks = cdiv(hidden, units)
    partial = torch.empty(chunks, heads, tokens, dtype=torch.float32, device=key.device)
    tiles = cdiv(tokens, rows)
    # Enough programs to fill the device, each with as many chunks as that leaves.
    each = max(1, min(chunks, chunks * tiles * heads // (2 * processors(key.device))))
    with on(key):
        _chunks[tiles, heads, cdiv(chunks, each)](
            key_pre, key, norm_pre.contiguous(), norm_post.contiguous(), w1, b1, w2, partial,
            tokens, heads, each,
            key_pre.stride(), key.stride(),
            HIDDEN=hidden, CHUNKS=chunks, DIM=dim, DIM_PAD=dot_size(dim), EPS=_NORM_EPS,
            ROWS=rows, UNITS=units, SILU=silu, APART=dot_size(dim) > 256, num_warps=warps,
            num_stages=1,
        )  # fmt: skip
        _finish[cdiv(tokens, _FINISH), heads](
            partial, b2, key, out if limit is None else out.view(torch.uint8), limit or 0.0,
            tokens, heads, CHUNKS=chunks, ROWS=_FINISH, DECIDE=limit is not None,
            INCLUSIVE=inclusive, num_warps=4,
        )  # fmt: skip
    return out


def _aligned(key: Tensor) -> Tensor:
    """The keys as the kernel always sees them: compiled once, for rows of whole 16 elements."""
    if key.shape[2] % 16:  # padding by nothing would still copy
        key = F.pad(key, (0, -key.shape[2] % 16))
    if key.stride(2) != 1 or key.stride(0) % 16 or key.stride(1) % 16:
        key = key.contiguous()
    return key if key.data_ptr() % 16 == 0 else key.clone()


def _tile(dim: int, itemsize: int) -> tuple[int, int, int]:
    """Tokens, hidden units and warps of a program; they depend on nothing that changes in a run."""
    if dim > 256:
        return (16, 16, 4) if itemsize == 4 else (32, 16, 4)
    if itemsize == 4:
        return (32, 32, 4) if dim <= 128 else (16, 16, 4)
    return (128, 64, 8) if dim <= 128 else (64, 32, 8)


@triton.jit
def _normed(x, weight, dim: tl.constexpr, EPS: tl.constexpr, dtype: tl.constexpr):
    """RMS norm in float32, rounded to the input's dtype before the weight is applied."""
    wide = x.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 1) / dim + EPS)[:, None]
    scaled = narrow(scaled, x.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    if weight.dtype == x.dtype:
        scaled = narrow(scaled, x.dtype).to(tl.float32)
    return narrow(scaled, dtype)


@triton.jit
def _gelu(x, dtype: tl.constexpr):
    """The exact GELU; below float32, within 5e-7 of it at a third of the instructions.

    gelu(x) = max(x, 0) - |x| Phi(-|x|), and log2 Phi(-a) is so close to a parabola that a
    polynomial of degree 5 serves (fitted so that the error of a Phi(-a) is the least).
    """
    if dtype == tl.float32:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    a = tl.abs(x)
    p = -0.4732939802e-3 * a + 7.08446063e-3
    p = p * a - 5.182716629e-2
    p = p * a - 0.459992649
    p = p * a - 1.150787768
    p = p * a - 1.000037633
    return tl.maximum(x, 0.0) - a * tl.exp2(p)


@triton.jit(do_not_specialize=["tokens", "heads", "each"])
def _chunks(
    key_pre, key, norm_pre, norm_post, w1, b1, w2, partial, tokens, heads, each,
    pre_strides, key_strides,
    HIDDEN: tl.constexpr, CHUNKS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, SILU: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Contribution of each chunk of hidden units to the logits: `[chunks, Hkv, T]`."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM_PAD)
    real = d < DIM
    mask = (t < tokens)[:, None] & real[None, :]
    weight = w1.dtype.element_ty
    at_pre = key_pre + h * pre_strides[0] + t[:, None] * pre_strides[1] + d[None, :]
    at_key = key + h * key_strides[0] + t[:, None] * key_strides[1] + d[None, :]
    scale_pre = tl.load(norm_pre + d, mask=real, other=0.0)  # [D]
    scale_key = tl.load(norm_post + d, mask=real, other=0.0)  # [D]
    pre = _normed(tl.load(at_pre, mask=mask, other=0.0), scale_pre, DIM, EPS, weight)  # [T, D]
    post = _normed(tl.load(at_key, mask=mask, other=0.0), scale_key, DIM, EPS, weight)  # [T, D]
    w1 += h * (HIDDEN * 2 * DIM)
    first = tl.program_id(2) * each
    for chunk in range(first, tl.minimum(first + each, CHUNKS)):
        unit = chunk * UNITS + tl.arange(0, UNITS)
        at = w1 + unit[:, None] * (2 * DIM) + d[None, :]
        there = (unit < HIDDEN)[:, None] & real[None, :]
        # All loads before the products, so that the chunk waits for memory once.
        left = tl.load(at, mask=there, other=0.0)  # [m, D]
        right = left if APART else tl.load(at + DIM, mask=there, other=0.0)  # [m, D]
        bias = tl.load(b1 + h * HIDDEN + unit, mask=unit < HIDDEN, other=0.0)  # [m]
        last = tl.load(w2 + h * HIDDEN + unit, mask=unit < HIDDEN, other=0.0)  # [m]
        x = dot(pre, tl.trans(left), tl.zeros([ROWS, UNITS], tl.float32))
        if APART:
            tl.debug_barrier()  # the second half takes the first one's place in shared memory
            right = tl.load(at + DIM, mask=there, other=0.0)
        x = dot(post, tl.trans(right), x)
        x += bias.to(tl.float32)[None, :]
        x = x / (1.0 + tl.exp(-x)) if SILU else _gelu(x, weight)
        total = tl.sum(x * last.to(tl.float32)[None, :], 1)
        tl.store(partial + (chunk * heads + h) * tokens + t, total, mask=t < tokens)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _finish(
    partial, b2, key, out, limit, tokens, heads,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DECIDE: tl.constexpr, INCLUSIVE: tl.constexpr,
):  # fmt: skip
    """Scores in `key`'s dtype, or whether those are above `limit`, a number of that dtype."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = t < tokens
    logit = tl.zeros([ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        logit += tl.load(partial + (chunk * heads + h) * tokens + t, mask=mask, other=0.0)  # [T]
    logit += tl.load(b2 + h).to(tl.float32)
    score = narrow(1.0 / (1.0 + tl.exp(-logit)), key.dtype.element_ty)
    if DECIDE:
        wide = score.to(tl.float32)
        above = wide > limit
        if INCLUSIVE:
            above = wide >= limit
        tl.store(out + h * tokens + t, above.to(tl.uint8), mask=mask)
    else:
        tl.store(out + h * tokens + t, score, mask=mask)
