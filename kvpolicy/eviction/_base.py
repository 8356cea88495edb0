"""Eviction: which stored tokens are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, get_args

import attrs
import torch
from torch import Tensor

from .._fields import one_of
from ..budget import Budget
from ..choices import When
from ..types import EvictionView, Write

WHEN: tuple[When, ...] = get_args(When)


class Eviction(ABC):
    """Scores the global tokens of a layer; those beyond the budget are dropped, their pages freed.

    `when="prompt_end"` evicts once, when a prompt has ended; `"decode"` also every `interval`
    decoded tokens while a head holds more than its budget. `queries` is the number of recent
    queries that `score` wants in its view. The local window is never evicted.
    """

    budget: Budget | None = None
    window: int | None = None  # wanted local window, as for an admission
    when: When = "prompt_end"
    queries: int = 0
    needs: frozenset[str] = frozenset()  # extra inputs of `mark`, as for an admission
    # Name and options of the op that gives what `score` says straight from the pages.
    fused: tuple[str, dict[str, Any]] | None = None

    @property
    def neutral(self) -> bool:
        """Whether nothing is ever evicted."""
        return False

    @abstractmethod
    def score(self, view: EvictionView) -> Tensor:
        """Scores `[B, Hkv, N]` of the global tokens; higher stays, -inf always goes."""

    def mark(self, write: Write) -> Tensor | None:
        """A decision bool `[Hkv, T]` to store with new tokens, or None."""
        return None

    def at(self, layer: int) -> Eviction:
        """The policy of one layer."""
        return self

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:  # noqa: B027
        """Raises ValueError if the policy does not fit a model with these sizes."""

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Eviction:
        """The same policy with its tensors on `device`; called once per cache."""
        return self


@attrs.frozen(kw_only=True)
class KeepAll(Eviction):
    """Evicts nothing: the neutral eviction."""

    @property
    def neutral(self) -> bool:
        return True

    def score(self, view: EvictionView) -> Tensor:
        return torch.zeros_like(view.valid, dtype=torch.float32)


def when_field() -> Any:
    """When an eviction acts."""
    return attrs.field(default="prompt_end", validator=one_of(*WHEN))
