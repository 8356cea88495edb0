"""Random tokens as an admission sees them, and cutting, joining and sharding them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..admission import Write


def sequence(
    tokens: int,
    *,
    layer: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    needs: frozenset[str],
    dtype: torch.dtype,
    start: int = 0,
    seed: int = 0,
) -> Write:
    """One sequence of normal keys and values at positions from `start`."""
    rng = torch.Generator().manual_seed(seed * 1000 + layer)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    key, value, key_pre = (draw(kv_heads, tokens, head_dim) for _ in range(3))
    states = draw(tokens, hidden)
    return Write(
        key,
        value,
        torch.arange(start, start + tokens),
        torch.tensor([0, tokens], dtype=torch.int32),
        layer,
        range(kv_heads),
        key_pre=key_pre if "key_pre" in needs else None,
        hidden=states if "hidden" in needs else None,
    )


def part(write: Write, low: int, high: int) -> Write:
    """Tokens `low:high` of one sequence as a call of their own."""
    return write._replace(
        key=write.key[:, low:high],
        value=write.value[:, low:high],
        positions=write.positions[low:high],
        cu_seqlens=torch.tensor([0, high - low], dtype=torch.int32),
        key_pre=None if write.key_pre is None else write.key_pre[:, low:high],
        hidden=None if write.hidden is None else write.hidden[low:high],
    )


def shard(write: Write, low: int, high: int) -> Write:
    """KV heads `low:high` alone, as a tensor-parallel rank sees them."""
    return write._replace(
        key=write.key[low:high],
        value=write.value[low:high],
        heads=range(write.heads[low], write.heads[high - 1] + 1),
        key_pre=None if write.key_pre is None else write.key_pre[low:high],
    )


def join(writes: Sequence[Write]) -> Write:
    """Sequences packed into one call."""
    sizes = torch.tensor([0, *(len(w.positions) for w in writes)])
    key_pre = [w.key_pre for w in writes if w.key_pre is not None]
    hidden = [w.hidden for w in writes if w.hidden is not None]
    return writes[0]._replace(
        key=torch.cat([w.key for w in writes], 1),
        value=torch.cat([w.value for w in writes], 1),
        positions=torch.cat([w.positions for w in writes]),
        cu_seqlens=sizes.cumsum(0).int(),
        key_pre=torch.cat(key_pre, 1) if key_pre else None,
        hidden=torch.cat(hidden) if hidden else None,
    )


def scaled(write: Write, factor: float) -> Write:
    """The same tokens with every vector multiplied."""
    return write._replace(
        key=write.key * factor,
        value=write.value * factor,
        key_pre=None if write.key_pre is None else write.key_pre * factor,
        hidden=None if write.hidden is None else write.hidden * factor,
    )
