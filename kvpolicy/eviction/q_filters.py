"""Q-Filters: keep the keys that a head's usual query likes."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import torch
from torch import Tensor

from .._fields import is_a
from .._files import read_named, write_safetensors
from .._names import named
from ..admission._files import Source, located, source_field
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ..ops import Ops
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens

NAME = "q_filters"  # of the tensor in a file


@named
@attrs.frozen(kw_only=True, eq=False)
class QFilters(Eviction):
    """Scores tokens by -(f . k), f being a direction of each layer and KV head.

    Godey et al., 2025 (NVIDIA/kvpress, qfilter_press.py). `filters` `[L, Hkv, D]`: the first right
    singular vector of a head's queries, its sign such that most queries lie against it.
    `from_pretrained` reads the authors' files (`nthngdy/<model>_qfilt` on the hub).

    Example:
        `CachePipeline(eviction=QFilters.from_pretrained("filters.safetensors", budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    filters: Tensor = attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))
    when: When = when_field()
    source: Source | None = source_field()

    def __attrs_post_init__(self) -> None:
        if self.filters.ndim != 3 or not self.filters.is_floating_point():
            raise ValueError(
                f"filters: wanted floats [L, Hkv, D], got {self.filters.dtype} "
                f"{list(self.filters.shape)}"
            )

    @property
    def prefers_window(self) -> int:
        return 1

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        budget: Budget | int,
        when: When = "prompt_end",
        revision: str | None = None,
    ) -> QFilters:
        """Reads `q_filters` of a `.safetensors` file.

        Args:
            path_or_repo: a file, a directory or a hub repository's id.
            file: the file's name in the directory or repository ("model.safetensors" there).
            budget: what stays.
            when: when tokens go.
            revision: branch, tag or commit of the hub repository.

        Raises:
            ValueError: the file is damaged or holds no filters.
        """
        path, source = located(path_or_repo, file, revision)
        found = read_named(path, NAME)
        return cls(budget=tokens_from_int(budget), filters=found[NAME], when=when, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file in the authors' layout."""
        write_safetensors(Path(path), {NAME: self.filters}, {})

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        view, keys = stored.view(), stored.pages.k
        own = self._of(view).to(keys.device, wide(keys))
        batch = len(view.lengths)
        return -ops.key_dots(stored.pages, stored.heads, own.expand(batch, -1, -1))

    def score(self, view: EvictionView) -> Tensor:
        keys = view.keys.to(wide(view.keys))
        return -(keys * self._of(view).to(keys)[:, None]).sum(-1)

    def _of(self, view: EvictionView) -> Tensor:
        """The filters `[Hkv, D]` of the heads present."""
        return self.filters[view.layer, view.heads.start : view.heads.stop]

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        wanted, found = [layers, kv_heads, head_dim], list(self.filters.shape)
        if found != wanted:
            raise ValueError(f"filters: wanted [L, Hkv, D] = {wanted} of the model, got {found}")

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> QFilters:
        return attrs.evolve(self, filters=self.filters.to(device))
