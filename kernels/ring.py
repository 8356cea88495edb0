"""The ring of a layer in a prompt call, in one launch: what it adds to the new tokens, what it
held, and what it holds then."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Ring, Segments
from ._launch import cdiv, check_dense, dense_last, on, power_of_two

_TOKENS = 32  # of one program


def advance_ring(
    ring: Ring, key: Tensor, value: Tensor, flags: Tensor, segments: Segments, *, undo: bool
) -> tuple[Ring, Ring | None]:
    """Recent tokens of a prompt call; the ring keeps the last ones; see `Ops.advance_ring`.

    Some programs have slots of the ring each, whose tokens they copy before they write; the others
    copy new tokens behind the ring's.
    """
    check_dense("advance_ring", k=ring.k, v=ring.v, flags=ring.flags)
    key, value, flags = dense_last(key), dense_last(value), dense_last(flags)
    (batch, heads, slots, dim), dim_v = ring.k.shape, ring.v.shape[3]
    recent, joins = Ring(key, value, flags), segments.cu_q != segments.cu_k
    if joins:
        total = segments.cu_k[-1]
        # Token after token, as they leave a projection.
        k, v = (x.new_empty(total, heads, x.shape[2]).transpose(0, 1) for x in (key, value))
        recent = Ring(k, v, flags.new_empty(heads, total))
    before = Ring(*(torch.empty_like(x) for x in ring)) if undo else None
    held = before or ring
    longest = max(b - a for a, b in pairwise(segments.cu_q))
    own = cdiv(slots, _TOKENS)
    with on(ring.k):
        _advance[own + (cdiv(longest, _TOKENS) if joins else 0), heads, batch](
            *ring, key, value, flags, *recent, *held, segments.cu_q_dev, segments.cu_k_dev,
            segments.start_dev, slots, own, flags.stride(0), recent.flags.stride(0),
            ring.k.stride(), ring.v.stride(), ring.flags.stride(), key.stride(), value.stride(),
            recent.k.stride(), recent.v.stride(), held.k.stride(), held.v.stride(),
            held.flags.stride(),
            DIM=dim, DIM_V=dim_v, DIM_PAD=power_of_two(dim), DIM_V_PAD=power_of_two(dim_v),
            TOKENS=_TOKENS, JOINS=joins, UNDO=undo, num_warps=4,
        )  # fmt: skip
    return recent, before


@triton.jit(do_not_specialize=["slots", "own", "flags_step", "recent_flags_step"])
def _advance(
    ring_k, ring_v, ring_flags, key, value, flags, recent_k, recent_v, recent_flags,
    held_k, held_v, held_flags, cu_q, cu_k, start, slots, own, flags_step, recent_flags_step,
    ring_k_strides, ring_v_strides, ring_flags_strides, key_strides, value_strides,
    recent_k_strides, recent_v_strides, held_k_strides, held_v_strides, held_flags_strides,
    DIM: tl.constexpr, DIM_V: tl.constexpr, DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr,
    TOKENS: tl.constexpr, JOINS: tl.constexpr, UNDO: tl.constexpr,
):  # fmt: skip
    """Some slots of a head's ring, or some of its new tokens."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q0 = tl.load(cu_q + b)
    new = tl.load(cu_q + b + 1) - q0
    first = tl.load(start + b)
    k0 = tl.load(cu_k + b)
    kept = tl.load(cu_k + b + 1) - k0 - new  # tokens of the ring that are recent
    key += h * key_strides[0]
    value += h * value_strides[0]
    flags += h * flags_step
    recent_k += h * recent_k_strides[0]
    recent_v += h * recent_v_strides[0]
    recent_flags += h * recent_flags_step
    n = tl.arange(0, TOKENS)
    if tl.program_id(0) >= own:
        i = (tl.program_id(0) - own) * TOKENS + n
        _move(
            key, value, flags, key_strides[1], value_strides[1], q0 + i,
            recent_k, recent_v, recent_flags, recent_k_strides[1], recent_v_strides[1],
            k0 + kept + i, i < new, DIM, DIM_V, DIM_PAD, DIM_V_PAD,
        )  # fmt: skip
        return
    ring_k += b * ring_k_strides[0] + h * ring_k_strides[1]
    ring_v += b * ring_v_strides[0] + h * ring_v_strides[1]
    ring_flags += b * ring_flags_strides[0] + h * ring_flags_strides[1]
    slot = tl.program_id(0) * TOKENS + n
    real = slot < slots
    if UNDO:
        _move(
            ring_k, ring_v, ring_flags, ring_k_strides[2], ring_v_strides[2], slot,
            held_k + b * held_k_strides[0] + h * held_k_strides[1],
            held_v + b * held_v_strides[0] + h * held_v_strides[1],
            held_flags + b * held_flags_strides[0] + h * held_flags_strides[1],
            held_k_strides[2], held_v_strides[2], slot, real, DIM, DIM_V, DIM_PAD, DIM_V_PAD,
        )  # fmt: skip
    if JOINS:
        old = first - 1 - (first - 1 - slot + slots) % slots  # the position that a slot holds
        _move(
            ring_k, ring_v, ring_flags, ring_k_strides[2], ring_v_strides[2], slot,
            recent_k, recent_v, recent_flags, recent_k_strides[1], recent_v_strides[1],
            k0 + kept + old - first, real & (old >= first - kept),
            DIM, DIM_V, DIM_PAD, DIM_V_PAD,
        )  # fmt: skip
    # What one thread is about to write others have read.
    tl.debug_barrier()
    end = first + new
    then = end - 1 - (end - 1 - slot + slots) % slots  # the one that it is to hold
    _move(
        key, value, flags, key_strides[1], value_strides[1], q0 + then - first,
        ring_k, ring_v, ring_flags, ring_k_strides[2], ring_v_strides[2], slot,
        real & (then >= first), DIM, DIM_V, DIM_PAD, DIM_V_PAD,
    )  # fmt: skip


@triton.jit
def _move(
    from_k, from_v, from_flags, from_k_step, from_v_step, i,
    to_k, to_v, to_flags, to_k_step, to_v_step, j, there,
    DIM: tl.constexpr, DIM_V: tl.constexpr, DIM_PAD: tl.constexpr, DIM_V_PAD: tl.constexpr,
):  # fmt: skip
    """Copies tokens i of one head to tokens j of another, where `there`."""
    d = tl.arange(0, DIM_PAD)
    e = tl.arange(0, DIM_V_PAD)
    i, j = i.to(tl.int64), j.to(tl.int64)
    mask = there[:, None] & (d < DIM)[None, :]
    mask_v = there[:, None] & (e < DIM_V)[None, :]
    k = tl.load(from_k + i[:, None] * from_k_step + d[None, :], mask=mask)  # [T, D]
    v = tl.load(from_v + i[:, None] * from_v_step + e[None, :], mask=mask_v)  # [T, Dv]
    bits = tl.load(from_flags + i, mask=there)  # [T]
    tl.store(to_k + j[:, None] * to_k_step + d[None, :], k, mask=mask)
    tl.store(to_v + j[:, None] * to_v_step + e[None, :], v, mask=mask_v)
    tl.store(to_flags + j, bits, mask=there)
