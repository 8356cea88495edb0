"""Numbers of decoded tokens: the leaving one's goes beside the pages, the new one's to the ring."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import ADMITTED, Numbers
from ._launch import check_dense, dense_last, on, power_of_two

_ADMITTED = tl.constexpr(ADMITTED)


def write_number(
    numbers: Numbers,
    counts: Tensor,
    flags: Tensor,
    number: Tensor | None,
    lengths: Tensor,
    active: Tensor,
    window: int,
) -> None:
    """Numbers of one decoded token a sequence; see `Ops.write_number`. One program a sequence."""
    stored, recent = numbers
    check_dense("write_number", stored=stored, recent=recent, flags=flags)
    batch, kv_heads, slots = recent.shape
    given = recent if number is None else dense_last(number)
    with on(recent):
        _write_number[(batch,)](
            stored, recent, counts, flags, given, lengths, active, window,
            stored.stride(), recent.stride(), counts.stride(), flags.stride(), given.stride(),
            GIVEN=number is not None, SLOTS=slots, HEADS=kv_heads, HEADS_PAD=power_of_two(kv_heads),
            num_warps=1,
        )  # fmt: skip


@triton.jit
def _write_number(
    stored, recent, counts, flags, given, lengths, active, window,
    stored_strides, recent_strides, counts_strides, flags_strides, given_strides,
    GIVEN: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
):  # fmt: skip
    """All heads of a sequence."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(active + b) == 0:
        return
    h = tl.arange(0, HEADS_PAD).to(tl.int64)
    real = h < HEADS
    length = tl.load(lengths + b).to(tl.int32)
    recent += b * recent_strides[0] + h * recent_strides[1]
    leaving = length - window
    out = tl.maximum(leaving, 0) % SLOTS
    bits = tl.load(flags + b * flags_strides[0] + h * flags_strides[1] + out, mask=real, other=0)
    leaves = (tl.where(real, leaving, -1) >= 0) & ((bits & _ADMITTED) != 0)
    held = tl.load(counts + b * counts_strides[0] + h * counts_strides[1], mask=real, other=0)
    old = tl.load(recent + out, mask=leaves, other=0.0)  # [H]
    tl.store(stored + b * stored_strides[0] + h * stored_strides[1] + held, old, mask=leaves)
    # With as many slots as the window is wide, the new token takes the place of the leaving one.
    tl.debug_barrier()
    new = tl.zeros([HEADS_PAD], tl.float32)
    if GIVEN:
        new = tl.load(given + b * given_strides[0] + h * given_strides[1], mask=real, other=0.0)
    tl.store(recent + length % SLOTS, new.to(tl.float32), mask=real)
