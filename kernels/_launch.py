"""What a launch needs to know: padded sizes, facts of the device, checks of its inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIKE = 16  # sequences; a prompt of 2 to so many runs the kernels of so many
LARGEST = 512  # head_dim of keys or values that tiles are made for
# Bytes of shared memory that one program may use, by compute capability.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227}

_CURRENT = nullcontext()


def power_of_two(size: int) -> int:
    """The lowest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def padded_batch(sequences: int) -> int:
    """The sequences that a prompt's kernels are compiled for: those of small batches are the same.

    One sequence has its own, whose programs look for no other one.
    """
    return 1 if sequences == 1 else power_of_two(max(sequences, _ALIKE))


def padded_units(sequences: int, heads: int) -> int:
    """Heads of all sequences, as many as a prompt's kernels are compiled for."""
    return power_of_two(padded_batch(sequences) * heads)


def dot_size(size: int) -> int:
    """`size` padded to what `tl.dot` takes: a power of two of at least 16."""
    return max(16, power_of_two(size))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, such as 90; 80 where the interpreter runs."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    return _SHARED.get(capability(device), 99) * 1024


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; few where the interpreter runs programs one by one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=32)
def numbers_on(device: torch.device, *rows: tuple[int, ...]) -> Tensor:
    """Numbers of the host as int32 rows on the device; to be read only.

    Layers of a call ask alike: the host waits for the copy once a call. Rows are padded with zeros
    to a common length, a multiple of 4: each starts at 16 bytes, as kernels were compiled for.
    """
    width = cdiv(max(map(len, rows)), 4) * 4
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int32, device=device)


def on(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device current, as a launch wants it; mostly it is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device(tensor.device)


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for what the kernels do not compute in, float64 above all."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} is {tensor.dtype}; kernels take float32, bfloat16 and float16 "
            "(backend='reference' takes float64)"
        )


def check_dims(op: str, dim: int, dim_v: int = 0) -> None:
    """Raises ValueError for heads of more channels than tiles are made for."""
    for name, size in (("head_dim", dim), ("head_dim of values", dim_v)):
        if size > LARGEST:
            raise ValueError(
                f"{op}: {name}: wanted at most {LARGEST}, got {size} "
                "(backend='reference' takes any)"
            )


def dense_last(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_dense(op: str, **tensors: Tensor) -> None:
    """Raises ValueError for a tensor written in place whose last dimension is not contiguous."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} wants a contiguous last dimension, got strides {tensor.stride()}"
            )
