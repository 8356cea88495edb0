"""Programmatic dependent launch: a kernel starts while the one before it on the stream ends.

A kernel launched with `dependent(...)` may start before its predecessor has finished. Each of its
programs calls `await_before` before it reads what the predecessor wrote or writes anything, and in
any case before it returns: the wait ends when the predecessor is complete and its writes are
visible, so that whatever is launched next again finds both complete. The predecessor itself was
launched in plain stream order, so what older launches wrote may be read before the wait. `let_next`
in the predecessor allows the dependent kernel to start once all programs of the predecessor have;
it promises no result. Devices before compute capability 9.0 launch in plain stream order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import _launch


def overlaps(device: torch.device) -> bool:
    """Whether launches on the device may overlap."""
    return _launch.capability(device) >= 90


def dependent(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may overlap the launch before it."""
    return {"launch_pdl": True} if overlaps(device) else {}


@triton.jit
def await_before(OVERLAP: tl.constexpr):
    """Waits for the kernel before this one, whose results are then visible."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next(OVERLAP: tl.constexpr):
    """Lets the kernel after this one start."""
    if OVERLAP:
        gdc_launch_dependents()
