"""A write gate for the tiny model."""

from __future__ import annotations

import torch

from kvpolicy import WriteGate


def small_gate(window: int = 16) -> WriteGate:
    generator = torch.Generator().manual_seed(1)
    return WriteGate(
        norm_pre=torch.ones(2, 32),
        norm_post=torch.ones(2, 32),
        w1=torch.randn(2, 2, 8, 64, generator=generator),
        b1=torch.zeros(2, 2, 8),
        w2=torch.randn(2, 2, 8, generator=generator) / 8,
        b2=torch.zeros(2, 2),
        window=window,
    )
