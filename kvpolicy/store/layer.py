"""LayerStore: the buffers of one layer and the policies that were placed on it."""

from __future__ import annotations

import attrs
from torch import Tensor

from ..admission._base import Admission
from ..eviction._base import Eviction
from ..selection._base import Selection
from .pages import PagePool


@attrs.define(eq=False)
class LayerStore:
    """One layer: a ring of recent tokens, a page table per head, and the layer's placed policies.

    `ring_k`, `ring_v` `[B, Hkv, slots, D]`, `ring_flags` `[B, Hkv, slots]` uint8: position p is in
    slot `p % slots`. `table` `[B, Hkv, M]` int32, `counts` `[B, Hkv]` int32 global tokens,
    `evicted` `[B, Hkv]` int64. `queries` `[B, Hq, slots', D]` are the recent queries an eviction
    asked for. `selected` is what the last decoded token read.
    """

    index: int
    window: int
    slides: bool
    ring_k: Tensor
    ring_v: Tensor
    ring_flags: Tensor
    table: Tensor
    counts: Tensor
    evicted: Tensor
    pool: PagePool
    admission: Admission
    selection: Selection
    eviction: Eviction
    queries: Tensor | None = None
    selected: Tensor | None = None

    @property
    def buffers(self) -> list[Tensor]:
        """Tensors with one row a sequence, pages excepted."""
        ring = [self.ring_k, self.ring_v, self.ring_flags, self.counts, self.evicted]
        return ring if self.queries is None else [*ring, self.queries]
