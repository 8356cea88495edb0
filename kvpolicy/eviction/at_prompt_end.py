"""Any admission as an eviction: dense prefill, then a drop."""

from __future__ import annotations

from typing import get_args

import attrs
import torch
from torch import Tensor

from .._fields import is_a, one_of
from .._knob import Knob
from .._names import named
from ..admission import Admission, Write
from ..choices import Generated
from ._base import Eviction
from ._view import EvictionView


@named
@attrs.frozen
class AtPromptEnd(Eviction):
    """Dense prompts, and from a prompt's end on what `admission` would have written.

    The prompt attends to everything, as in the original DuoAttention, StreamingLLM and kvpress, so
    the peak is the full cache. The decision about a token is taken and stored when it is written.
    At the prompt's end the tokens that `admission` does not want are dropped; those still in the
    window go when they leave it. Generated tokens follow `admission` too, as in mit-han-lab's
    DuoAttention and StreamingLLM, or stay, as in kvpress: `generated="keep"`. Beside an admission
    of the pipeline's a token stays if both want it. A later turn's prompt is dense until its end.

    Example:
        `CachePipeline(eviction=AtPromptEnd(DuoAttention.from_pretrained(path, sparsity=0.5)))`
    """

    admission: Admission = attrs.field(validator=is_a(Admission, "an admission"))
    generated: Generated = attrs.field(
        default="admission",
        kw_only=True,
        validator=one_of(*get_args(Generated)),
        metadata={"before": "keep"},
    )

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

    def admit(self, write: Write) -> Tensor | None:
        if self.generated == "keep" or self.admission.neutral:
            return None
        return self.admission.admit(write)

    def score(self, view: EvictionView) -> Tensor:
        return torch.where(view.marked, 0.0, float("-inf"))

    def knob(self, *, window: int, seen: int, layers: int, kv_heads: int) -> Knob[Eviction] | None:
        inner = self.admission.knob()
        if inner is None:
            return None
        return inner.map(lambda found: attrs.evolve(self, admission=found))

    def at(self, layer: int) -> Eviction:
        return attrs.evolve(self, admission=self.admission.at(layer))

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.admission.check(layers, kv_heads, head_dim)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> Eviction:
        return attrs.evolve(self, admission=self.admission.place(device, dtype, backend))
