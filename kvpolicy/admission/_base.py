"""Admission: which tokens enter the global cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor

from ..types import Write


class Admission(ABC):
    """Decides at write time, for every KV head, whether a token outlives the local window.

    A subclass is a frozen value. `admit` must be stateless, causal and per token: the decision for
    a token depends on that token alone, so it cannot depend on how tokens are cut into calls.
    Set `needs` to a subset of {"key_pre", "hidden"} to receive those in `Write`.
    """

    window: int | None = None
    needs: frozenset[str] = frozenset()

    @property
    def neutral(self) -> bool:
        """Whether everything is admitted, so that dense kernels serve."""
        return False

    @abstractmethod
    def admit(self, write: Write) -> Tensor:
        """Decisions bool `[Hkv, T]` for the new tokens of one layer."""

    def at(self, layer: int) -> Admission:
        """The policy of one layer."""
        return self

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:  # noqa: B027
        """Raises ValueError if the policy does not fit a model with these sizes."""

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Admission:
        """The same policy with its tensors on `device`; called once per cache."""
        return self


@attrs.frozen(kw_only=True)
class AdmitAll(Admission):
    """Writes every token: the neutral admission."""

    @property
    def neutral(self) -> bool:
        return True

    def admit(self, write: Write) -> Tensor:
        heads, tokens = write.key.shape[:2]
        return torch.ones(heads, tokens, dtype=torch.bool, device=write.key.device)
