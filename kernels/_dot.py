"""Matrix products as the kernels use them."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as integers and would multiply those.
_INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32; float32 operands are not rounded to TF32."""
    if _INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
