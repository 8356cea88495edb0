"""Heads, tokens and pages that lie more than 2**31 elements apart: offsets are 64-bit products.

A layer of a million tokens, eight heads and 128 channels has 2**30 elements, four such sequences
more than an int32 counts. Here the elements between are never touched, so that it takes no memory.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from tests.support.kernels import every_kernel, prompt_cases  # noqa: F401  # registers its cases
from tests.support.kernels.far import FAR, far, far_apart
from tests.support.kernels.op_cases import CASES
from tests.support.kernels.pool import CUDA

pytestmark = pytest.mark.skipif(CUDA, reason="a GPU's memory is taken as a whole")

FUNCTIONS = {
    "-".join(op for op, own in CASES.items() if own is function): function
    for function in dict.fromkeys(CASES.values())
}
# Read by the functions that the others read by; each takes longest, and passed when it was written.
LEFT_OUT = ("selected_prefill", "keys_at-antidiagonal_blocks")
QUICK = ("append", "move_kept", "write_number")
SIZE = attrs.evolve(every_kernel.TINY[0], prompt=20)


@pytest.mark.parametrize("op", QUICK)
def test_what_a_kernel_is_given_may_lie_far_apart(op):
    with far_apart(1):
        FUNCTIONS[op](SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in FUNCTIONS if op not in QUICK + LEFT_OUT])
def test_every_kernel_reads_what_lies_far_apart(op):
    with far_apart(1):
        FUNCTIONS[op](SIZE)


def test_far_is_far():
    near = torch.arange(30.0).view(5, 3, 2)
    for which, dim in ((0, 0), (1, 1)):
        found = far(near, which)
        assert torch.equal(found, near) and (near.shape[dim] - 1) * found.stride(dim) >= FAR
        assert found.stride(dim) < FAR  # so that a kernel is given it in 32 bits
