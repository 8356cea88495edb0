"""Products and roundings, the same compiled and interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32; float32 operands are not rounded to TF32."""
    if _INTERPRET:
        # The interpreter keeps bfloat16 as integers and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 `x` rounded to the nearest value of `dtype`, ties to even."""
    if _INTERPRET and dtype == tl.bfloat16:
        # The interpreter would cut the low bits off.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
