"""Admission: which tokens enter the global cache."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from .._knob import Knob
from .._names import named
from .._option import option


class Write(NamedTuple):
    """New tokens of one layer, packed over sequences, as an admission sees them.

    `key`, `value` are `[Hkv, T, D]` (keys after RoPE), `positions` `[T]` int64 counts real tokens
    of each sequence from 0, `cu_seqlens` `[B + 1]` int32 delimits sequences in T. `heads` are the
    global ids of the KV heads present (all of them without tensor parallelism). `key_pre` `[Hkv, T,
    D]` (keys before RoPE) and `hidden` `[T, hidden]` (attention input) are given only if the
    policy's `needs` names them.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    layer: int
    heads: range
    key_pre: Tensor | None = None
    hidden: Tensor | None = None


class Admission(ABC):
    """Decides at write time, for every KV head, whether a token outlives the local window.

    A subclass is a frozen value. `admit` must be stateless, causal and per token: the decision for
    a token depends on that token alone, so it cannot depend on how tokens are cut into calls.
    """

    @option
    def window(self) -> int | None:
        """The local window that it demands, in tokens; None: any."""
        return None

    @option
    def needs(self) -> frozenset[str]:
        """A subset of {"key_pre", "hidden"}: what it wants in `Write` besides keys and values."""
        return frozenset()

    @option
    def neutral(self) -> bool:
        """Whether everything is admitted, so that dense kernels serve."""
        return False

    @option
    def by_position(self) -> bool:
        """Whether decisions follow from layer, head and position, so that they can be counted
        without a text."""
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

    def knob(self, pattern: str | os.PathLike[str] | None = None) -> Knob[Admission] | None:
        """The number that decides how much is admitted, for calibration; None: there is none.

        `pattern` is the folder of head values, for a policy that has lost them.
        """
        return None


@named
@attrs.frozen(kw_only=True)
class AdmitAll(Admission):
    """Writes every token: the neutral admission."""

    @property
    def neutral(self) -> bool:
        return True

    @property
    def by_position(self) -> bool:
        return True

    def admit(self, write: Write) -> Tensor:
        heads, tokens = write.key.shape[:2]
        return torch.ones(heads, tokens, dtype=torch.bool, device=write.key.device)
