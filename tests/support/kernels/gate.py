"""Weights of a write gate."""

from __future__ import annotations

import torch

from tests.support.kernels.pool import randn


def weights(heads: int, dim: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    parts = [
        1 + 0.2 * randn(dim, dtype=torch.float32, seed=1),
        1 + 0.2 * randn(dim, dtype=torch.float32, seed=2),
        randn(heads, hidden, 2 * dim, dtype=torch.float32, seed=3) * (2 * dim) ** -0.5,
        0.1 * randn(heads, hidden, dtype=torch.float32, seed=4),
        2 * randn(heads, hidden, dtype=torch.float32, seed=5) * hidden**-0.5,
        randn(heads, dtype=torch.float32, seed=6),
    ]
    return [part.to(dtype) for part in parts]
