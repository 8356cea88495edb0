"""Random admission: a baseline with a chosen sparsity."""

from __future__ import annotations

import os

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
        heads = torch.arange(write.heads.start, write.heads.stop, device=write.positions.device)
        salt = (write.layer + 1) * 0x10001 + self.seed * 0x100000001
        x = _mix(heads + ((salt + (1 << 63)) % (1 << 64) - (1 << 63)))  # as a signed 64-bit number
        x = _mix(x[:, None] ^ (write.positions.long() * _GOLDEN))
        # 53 bits: every value is an exact double.
        return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53 >= self.sparsity

    def knob(self, pattern: str | os.PathLike[str] | None = None) -> Knob[Admission]:
        return Knob(
            name="sparsity", at=lambda x: 1 - x, set=lambda x: attrs.evolve(self, sparsity=x)
        )


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
