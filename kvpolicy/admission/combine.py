"""Combining admissions."""

from __future__ import annotations

from functools import reduce
from typing import Any

import attrs
import torch
from torch import Tensor

from .._fields import shown
from .._names import named
from ._base import Admission, Write


def _members(instance: Admission, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"policies: wanted a tuple of admissions, got {shown(value)}")
    if not value:
        raise ValueError("policies: wanted at least one admission, got none")
    for policy in value:
        if not isinstance(policy, Admission):
            many = isinstance(policy, list | tuple)
            raise TypeError(
                f"policies: wanted admissions, got {shown(policy)}"
                + ("; write them one by one, or with a star: any_of(*policies)" if many else "")
            )
    windows = {policy.window for policy in value if policy.window is not None}
    if len(windows) > 1:
        raise ValueError(f"policies: their windows disagree: {sorted(windows)}; give all the same")


@attrs.frozen
class _Combined(Admission):
    policies: tuple[Admission, ...] = attrs.field(validator=_members)

    @property
    def window(self) -> int | None:
        return next((p.window for p in self.policies if p.window is not None), None)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(p.needs for p in self.policies))

    @property
    def by_position(self) -> bool:
        return all(p.by_position for p in self.policies)

    def at(self, layer: int) -> Admission:
        return attrs.evolve(self, policies=tuple(p.at(layer) for p in self.policies))

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        for policy in self.policies:
            policy.check(layers, kv_heads, head_dim)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Admission:
        placed = tuple(p.place(device, dtype, backend) for p in self.policies)
        return attrs.evolve(self, policies=placed)


@named
@attrs.frozen
class AnyOf(_Combined):
    """Admits what at least one member admits."""

    @property
    def neutral(self) -> bool:
        return any(p.neutral for p in self.policies)

    def admit(self, write: Write) -> Tensor:
        return reduce(torch.logical_or, (p.admit(write) for p in self.policies))


@named
@attrs.frozen
class AllOf(_Combined):
    """Admits what every member admits."""

    @property
    def neutral(self) -> bool:
        return all(p.neutral for p in self.policies)

    def admit(self, write: Write) -> Tensor:
        return reduce(torch.logical_and, (p.admit(write) for p in self.policies))


def any_of(*policies: Admission) -> AnyOf:
    """Admits a token if any of `policies` does.

    Example:
        `any_of(gate, LocalAttention(window=256, sinks=4))`
    """
    return AnyOf(policies)


def all_of(*policies: Admission) -> AllOf:
    """Admits a token if all of `policies` do."""
    return AllOf(policies)
