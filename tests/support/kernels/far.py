"""Tensors and pages that lie more than 2**31 elements apart, in memory that is never touched."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.support.kernels import mirror, pool

FAR = 1 << 31  # elements
_UNRESERVED = 0x4000  # MAP_NORESERVE: the system promises no memory for what nobody writes


def room(elements: int, dtype: torch.dtype) -> Tensor:
    """So many elements of 0, which take memory where they are written."""
    size = elements * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _UNRESERVED
    return torch.frombuffer(mmap.mmap(-1, size, flags), dtype=dtype)


def far(x: Tensor, which: int) -> Tensor:
    """A copy in which one dimension before the last spans FAR elements; `which` says the one.

    Its steps fit 32 bits from a size of 3 on, their products with an index do not.
    """
    wide = [n for n in range(x.ndim - 1) if x.shape[n] > 1]
    if not wide:
        return x.clone()
    chosen = wide[which % len(wide)]
    strides, inner = [0] * x.ndim, 1
    for n in reversed(range(x.ndim)):
        if n != chosen:
            strides[n], inner = inner, inner * x.shape[n]
    step = max(-(-FAR // (x.shape[chosen] - 1)), inner)
    strides[chosen] = -(-step // 16) * 16  # as aligned as rows of a store
    whole = room(strides[chosen] * x.shape[chosen], x.dtype)
    return whole.as_strided(x.shape, strides).copy_(x)


def slab(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory of some pages, far from any other's."""
    count = torch.Size(shape).numel()
    return room(FAR + count, dtype)[:count].view(shape)


@contextlib.contextmanager
def far_apart(which: int) -> Iterator[None]:
    """What kernels are given is far, slabs too; the interpreter runs them where it lies."""
    executor = interpreter.GridExecutor
    with (
        mock.patch.object(mirror, "placed", lambda x: far(x, which)),
        mock.patch.object(pool, "slab", slab),
        # It copies whole storages back to where they came from, which is here.
        mock.patch.object(executor, "_restore_args_dev", lambda *_: None),
    ):
        yield
