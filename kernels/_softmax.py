"""The online softmax: weights of a block of logits relative to the largest one so far.

Logarithms are to base 2, so `scale` includes log2(e). What was summed before is multiplied by
`decay` when a larger logit comes. Rows start at `top` -inf and `total` 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import dot, narrow


@triton.jit
def weigh(logits, scale, top, total, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """Weights exp2(logits * scale - top) with the new top, the decay of old ones, new top, total.

    The sum runs over AXIS. MASKED allows logits of -inf, which weigh nothing.
    """
    new_top = tl.maximum(top, tl.max(logits, AXIS) * scale)
    base = new_top
    if MASKED:  # a row that has seen nothing yet would compute inf - inf
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp2(top - base)
    if len(logits.shape) == 2:
        base = tl.expand_dims(base, AXIS)
    weights = tl.exp2(logits * scale - base)
    return weights, decay, new_top, total * decay + tl.sum(weights, AXIS)


@triton.jit
def attend_step(q, k, v, seen, scale, top, total, acc, MASKED: tl.constexpr):
    """A block of keys and values `[N, D]` for queries `[M, D]`: new top, total `[M]`, acc `[M, D]`.

    `seen` `[M, N]` or `[1, N]` hides keys if MASKED. A query's output is acc / total.
    """
    logits = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))  # [M, N]
    if MASKED:
        logits = tl.where(seen, logits * scale, float("-inf"))
        weights, decay, top, total = weigh(logits, 1.0, top, total, 1, True)
    else:
        weights, decay, top, total = weigh(logits, scale, top, total, 1, False)
    acc = dot(narrow(weights, v.dtype), v, acc * decay[:, None])
    return top, total, acc


@triton.jit
def merge(level, parts, top, total, acc):
    """Adds normalised outputs `[P, D]` of parts with log-sum-exps `level` `[P]` to one row."""
    weights, decay, top, total = weigh(level, 1.0, top, total, 0, True)
    return top, total, acc * decay + tl.sum(weights[:, None] * parts, 0)


@triton.jit
def normalised(acc, total):
    """The output `[M, D]`; zeros for a row that has seen nothing."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def level_of(top, total):
    """The log-sum-exp of rows; -inf for one that has seen nothing."""
    # `top` is -inf where the total is 0; the interpreter objects to the logarithm of that.
    return top + tl.log2(tl.where(total == 0, 1.0, total))
