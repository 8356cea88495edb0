"""The online softmax: weights of a block of logits relative to the largest one so far.

Logarithms are to base 2, so `scale` includes log2(e). What was summed before is multiplied by
`decay` when a larger logit comes. Rows start at `top` -inf and `total` 0. Where logits are capped,
`cap` includes log2(e) and `scale` what divides by the cap: see `factors`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import dot, narrow

LOG2E = 1.4426950408889634
_TO_SQUARE = tl.constexpr(-2 * LOG2E)
_SMALL = tl.constexpr(0.25)


def factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """What kernels take as `scale` and `cap`, for logits as `kvpolicy.ops.Ops` defines them."""
    if softcap is None:
        return scale * LOG2E, None
    return scale / softcap, softcap * LOG2E


@triton.jit
def capped(logits, scale, cap, FINE: tl.constexpr):
    """cap * tanh(scale * logits), small ones too to float32's relative precision if FINE."""
    x = logits * scale
    size = tl.abs(x)
    decay = tl.exp2(size * _TO_SQUARE)
    found = (1.0 - decay) / (1.0 + decay)
    if FINE:  # the difference above has few digits left there; the next term is below 1e-8
        square = x * x
        series = square * (0.13333333333 + square * (-0.05396825397 + square * 0.02186948854))
        found = tl.where(size < _SMALL, size + size * square * (-0.33333333333 + series), found)
    return cap * tl.where(x < 0.0, -found, found)


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
def attend_step(q, k, v, seen, scale, cap, top, total, acc, MASKED: tl.constexpr):
    """A block of keys `[N, D]` and values `[N, Dv]` for queries `[M, D]`.

    Returns the new top, total `[M]` and acc `[M, Dv]`. `seen` `[M, N]` or `[1, N]` hides keys if
    MASKED; logits are capped unless `cap` is None. A query's output is acc / total.
    """
    logits = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))  # [M, N]
    if cap is not None:
        logits = capped(logits, scale, cap, q.dtype == tl.float32)
        scale = 1.0
    if MASKED:
        logits = tl.where(seen, logits * scale, float("-inf"))
        weights, decay, top, total = weigh(logits, 1.0, top, total, 1, True)
    else:
        weights, decay, top, total = weigh(logits, scale, top, total, 1, False)
    acc = dot(narrow(weights, v.dtype), v, acc * decay[:, None])
    return top, total, acc


@triton.jit
def add_sink(sink, top, total, acc):
    """Adds a logit without a value, to base 2, to each row: top, total `[M]` and acc `[M, Dv]`."""
    _, decay, top, total = weigh(sink[:, None], 1.0, top, total, 1, True)
    return top, total, acc * decay[:, None]


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
