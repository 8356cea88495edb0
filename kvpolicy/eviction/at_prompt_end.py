"""Any admission as an eviction: dense prefill, then a drop."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .._fields import is_a
from ..admission import Admission, Write
from ._base import Eviction, EvictionView


@attrs.frozen
class AtPromptEnd(Eviction):
    """Drops at the prompt's end what `admission` would not have written.

    The prompt itself attends to everything, as in the original DuoAttention and in kvpress, so the
    peak is the full cache. The decision is taken and stored when a token is written. Tokens still
    in the window when the prompt ends go when they leave it; generated tokens follow the
    pipeline's own admission.

    Example:
        `CachePipeline(eviction=AtPromptEnd(DuoAttention.from_pretrained(path, sparsity=0.5)))`
    """

    admission: Admission = attrs.field(validator=is_a(Admission, "an admission"))

    @property
    def window(self) -> int | None:
        return self.admission.window

    @property
    def needs(self) -> frozenset[str]:
        return self.admission.needs

    @property
    def forgets_window(self) -> bool:
        return True

    def mark(self, write: Write) -> Tensor:
        return self.admission.admit(write)

    def score(self, view: EvictionView) -> Tensor:
        return torch.where(view.marked, 0.0, float("-inf"))

    def at(self, layer: int) -> Eviction:
        return AtPromptEnd(self.admission.at(layer))

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.admission.check(layers, kv_heads, head_dim)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Eviction:
        return AtPromptEnd(self.admission.place(device, dtype, backend))
