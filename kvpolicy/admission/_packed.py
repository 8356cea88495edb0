"""bfloat16 weights in two thirds of their bytes: signs and mantissas plain, exponents compressed.

The exponents of trained weights repeat, their signs and mantissas do not. Coded by frequency alone
the former take a third of their bytes; mixed, as numbers are stored, they spoil each other. No bit
is lost.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

KEY, PACKING = "packing", "bfloat16 with deflated exponents"  # what a file's metadata says of it
EXPONENTS = "exponents"  # of all tensors, in the order of their names


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mantissas and signs of bfloat16 tensors as uint8 of their shapes, and `EXPONENTS`, uint8."""
    packed, coder = {}, zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    coded = b""
    for name in sorted(state):
        value = state[name]
        if value.dtype != torch.bfloat16:
            raise TypeError(f"{name}: wanted torch.bfloat16, got {value.dtype}")
        bits = value.contiguous().view(torch.int16).int() & 0xFFFF
        packed[name] = ((bits & 0x7F) << 1 | bits >> 15).to(torch.uint8)
        coded += coder.compress((bits >> 7 & 0xFF).to(torch.uint8).numpy().tobytes())
    coded += coder.flush()
    packed[EXPONENTS] = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    return packed


def unpack(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The inverse of `pack`; `source` names the file in errors.

    Raises:
        ValueError: a tensor is not uint8, or there are not as many exponents as mantissas.
    """
    for name, part in state.items():
        if part.dtype != torch.uint8:
            raise ValueError(f"{source}: {name}: wanted torch.uint8, got {part.dtype}")
    names = sorted(set(state) - {EXPONENTS})
    counts = [state[name].numel() for name in names]
    exponents = _inflated(state, sum(counts), source).split(counts)
    values = {}
    for name, exponent in zip(names, exponents, strict=True):
        rest = state[name].int()
        bits = (exponent.int().view_as(rest) << 7 | rest >> 1) - ((rest & 1) << 15)  # signed
        values[name] = bits.to(torch.int16).view(torch.bfloat16)
    return values


def _inflated(state: Mapping[str, Tensor], count: int, source: str) -> Tensor:
    """`count` exponents, uint8; never more are made, whatever the file says."""
    if EXPONENTS not in state:
        raise ValueError(f"{source}: {EXPONENTS}: wanted a tensor of that name, got none")
    coder = zlib.decompressobj()
    try:
        found = coder.decompress(state[EXPONENTS].numpy().tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"{source}: {EXPONENTS}: wanted deflated bytes: {error}") from error
    if len(found) != count or not coder.eof:
        raise ValueError(
            f"{source}: {EXPONENTS}: wanted {count}, got "
            f"{'more' if len(found) > count else len(found)}"
        )
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def pack_file(path: Path, out: Path) -> None:
    """Packs a `.safetensors` file of bfloat16 tensors, with its metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    save_file(pack(state), out, metadata={**metadata, KEY: PACKING})
