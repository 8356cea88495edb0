"""Random admission: a baseline with a chosen sparsity."""

from __future__ import annotations

import math
import os
from functools import lru_cache

import attrs
import torch
from torch import Tensor

from .._fields import fraction, seed
from .._knob import Knob
from .._names import named
from ._base import Admission, Write

# Odd constants of the splitmix64 finaliser, as signed 64-bit numbers.
_MIX = (-4658895280553007687, -7723592293110705685)
_GOLDEN = -7046029254386353131


@named
@attrs.frozen(kw_only=True)
class RandomGate(Admission):
    """Drops each token of each head with probability `sparsity` (WG-KV's `random_sparsity`).

    The choice is a hash of (seed, layer, head, position), so it is the same for any cut, batch or
    shard.
    """

    sparsity: float = attrs.field(validator=fraction())
    seed: int = attrs.field(default=0, validator=seed)

    @property
    def by_position(self) -> bool:
        return True

    def admit(self, write: Write) -> Tensor:
        salt = (write.layer + 1) * 0x10001 + self.seed * 0x100000001
        x = _of_heads(write.heads, salt, write.positions.device)
        x = _mix(x[:, None] ^ (write.positions.long() * _GOLDEN))
        # The highest 53 bits are a fraction, an exact double, of at least the sparsity. So whole
        # numbers are compared; without their sign bit signed ones have the order of unsigned.
        least = math.ceil(self.sparsity * 2**53) << 11
        if least == 1 << 64:
            return torch.zeros_like(x, dtype=torch.bool)
        return (x ^ -(1 << 63)) >= least - (1 << 63)

    def knob(self, pattern: str | os.PathLike[str] | None = None) -> Knob[Admission]:
        return Knob(
            name="sparsity", at=lambda x: 1 - x, set=lambda x: attrs.evolve(self, sparsity=x)
        )


@lru_cache(maxsize=4096)
def _of_heads(heads: range, salt: int, device: torch.device) -> Tensor:
    """The hashes `[H]` of heads, which all positions share."""
    with torch.inference_mode(False):
        numbers = torch.arange(heads.start, heads.stop)
        signed = (salt + (1 << 63)) % (1 << 64) - (1 << 63)
        return _mix(numbers + signed).to(device)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
