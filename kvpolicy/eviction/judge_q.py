"""Judge Q: keep what trained query tokens look at when they follow the prompt."""

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
from ..choices import Accumulates
from ._base import Eviction
from ._view import EvictionView

NAME = "embeds"  # of the tensor in a file


@named
@attrs.frozen(kw_only=True, eq=False)
class JudgeQ(Eviction):
    """Scores tokens by the mean softmax weight of trained tokens that are put behind the prompt.

    Liu et al., 2025 (arXiv 2509.10798; no code was published). `embeds` `[n, hidden]` are input
    embeddings, trained so that they look where the answer's tokens would. They run through the
    model in a fork, `attached.replay(cache, inputs_embeds=policy.embeds_for(batch), sinks=0)`,
    before the prompt ends; without it the end of the prompt raises PhaseError. `kvpolicy.training`
    has `train_judge`.

    Example:
        `CachePipeline(eviction=JudgeQ.from_pretrained("judge.safetensors", budget=1024))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    embeds: Tensor = attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))
    source: Source | None = source_field()
    replayed = True

    def __attrs_post_init__(self) -> None:
        if self.embeds.ndim != 2 or 0 in self.embeds.shape or not self.embeds.is_floating_point():
            raise ValueError(
                f"embeds: wanted floats [n, hidden], got {self.embeds.dtype} "
                f"{list(self.embeds.shape)}"
            )

    @property
    def accumulates(self) -> Accumulates:
        return "sum"

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        budget: Budget | int,
        revision: str | None = None,
    ) -> JudgeQ:
        """Reads `embeds` of a `.safetensors` file.

        Args:
            path_or_repo: a file, a directory or a hub repository's id.
            file: the file's name in the directory or repository.
            budget: what stays.
            revision: branch, tag or commit of the hub repository.

        Raises:
            ValueError: the file is damaged or holds no tokens.
        """
        path, source = located(path_or_repo, file, revision)
        found = read_named(path, NAME)
        return cls(budget=tokens_from_int(budget), embeds=found[NAME], source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file."""
        write_safetensors(Path(path), {NAME: self.embeds}, {})

    def embeds_for(self, batch: int = 1) -> Tensor:
        """The same tokens `[batch, n, hidden]` for each of the sequences."""
        return self.embeds.expand(batch, -1, -1)

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        return view.numbers

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> JudgeQ:
        return attrs.evolve(self, embeds=self.embeds.to(device))
