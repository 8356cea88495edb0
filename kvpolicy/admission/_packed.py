"""bfloat16 weights as planes of bytes, so that an archive holds them in two thirds of the bytes.

The exponents of trained weights repeat, their signs and mantissas do not. Apart from each other the
former compress eightfold; mixed, as numbers are stored, they spoil each other. No bit is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

KEY, PLANES = "packing", "bfloat16 planes"  # what a file's metadata says of it


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Planes uint8 `[2, ...]` of bfloat16 tensors `[...]`: exponents, then mantissas and signs."""
    planes = {}
    for name, value in state.items():
        if value.dtype != torch.bfloat16:
            raise TypeError(f"{name}: wanted torch.bfloat16, got {value.dtype}")
        bits = value.contiguous().view(torch.int16).int() & 0xFFFF
        halves = (bits >> 7 & 0xFF, (bits & 0x7F) << 1 | bits >> 15)
        planes[name] = torch.stack(halves).to(torch.uint8)
    return planes


def unpack(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The inverse of `pack`; `source` names the file in errors.

    Raises:
        ValueError: a tensor is no pair of planes.
    """
    values = {}
    for name, planes in state.items():
        if planes.dtype != torch.uint8 or planes.ndim < 1 or planes.shape[0] != 2:
            raise ValueError(
                f"{source}: {name}: wanted two planes of uint8, got {planes.dtype} "
                f"{tuple(planes.shape)}"
            )
        exponent, rest = planes.int().unbind()
        sign = rest & 1
        bits = (exponent << 7 | rest >> 1) - (sign << 15)  # as a signed number of 16 bits
        values[name] = bits.to(torch.int16).view(torch.bfloat16)
    return values


def pack_file(path: Path, out: Path) -> None:
    """Writes the planes of a `.safetensors` file of bfloat16 tensors, with its metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    save_file(pack(state), out, metadata={**metadata, KEY: PLANES})
