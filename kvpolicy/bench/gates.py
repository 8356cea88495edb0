"""Write gates with random weights, and an admission that runs one but admits a wanted fraction."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from ..admission import Admission, RandomGate, Write, WriteGate

_STRIDE = 997  # positions between the decisions of one layer and the next


def random_gate(
    layers: int, kv_heads: int, width: int, dim: int, window: int, device: torch.device
) -> WriteGate:
    """A gate of `width` hidden units with random weights, in bfloat16."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.bfloat16, device=device)

    ones = torch.ones(layers, dim, dtype=torch.bfloat16, device=device)
    return WriteGate(
        norm_pre=ones, norm_post=ones, w1=normal(layers, kv_heads, width, 2 * dim, scale=dim**-0.5),
        b1=normal(layers, kv_heads, width), w2=normal(layers, kv_heads, width, scale=width**-0.5),
        b2=normal(layers, kv_heads), window=window,
    )  # fmt: skip


@attrs.frozen(kw_only=True, eq=False)
class FixedFraction(Admission):
    """Runs `gate` on every token and answers with RandomGate's decisions instead.

    They are looked up in a table `decisions` `[Hkv, N]`, one launch, because hashing inside a
    decode step would cost more launches than the gate.
    """

    gate: WriteGate
    decisions: Tensor = attrs.field(repr=False)
    window: int
    needs = frozenset({"key_pre"})

    @classmethod
    def of(cls, gate: WriteGate, fraction: float, tokens: int) -> FixedFraction:
        """Admits `fraction` of the tokens at positions below `tokens`."""
        device = gate.w1.device
        at = torch.arange(tokens + gate.layers * _STRIDE, device=device)
        empty = torch.empty(gate.kv_heads, 0, 0, device=device)
        write = Write(empty, empty, at, at[:2], 0, range(gate.kv_heads))
        decisions = RandomGate(sparsity=1 - fraction).admit(write)
        assert gate.window is not None
        return cls(gate=gate, decisions=decisions, window=gate.window)

    def admit(self, write: Write) -> Tensor:
        self.gate.admit(write)
        own = self.decisions[write.heads.start : write.heads.stop, write.layer * _STRIDE :]
        return own.index_select(1, write.positions)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.gate.check(layers, kv_heads, head_dim)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> FixedFraction:
        return attrs.evolve(
            self,
            gate=self.gate.place(device, dtype, backend),
            decisions=self.decisions.to(device),
        )
