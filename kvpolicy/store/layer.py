"""LayerStore: the buffers of one layer and the policies that were placed on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from ..admission import Admission
from ..eviction import Eviction
from ..ops import Heads, Numbers, Ring
from ..rope import Rope
from ..selection import Selection
from ..spec import LayerSizes
from .pool import PagePool

# Buffers that a layer has where its eviction asks for them.
ASKED = ("queries", "query_ring", "query_sums", "query_products", "hidden")


@attrs.define(eq=False)
class LayerStore:
    """One layer: a ring of recent tokens, a page table per head, and the layer's placed policies.

    `table` `[B, Hkv, M]` int32, `counts` `[B, Hkv]` int32 global tokens, `evicted` `[B, Hkv]`
    int64. `queries` `[B, Hq, slots', D]` is the ring of recent queries that an eviction asked for.
    `numbers` are those of tokens, where an eviction asked for some. `selected` is what the last
    decoded token read, `chosen` `[2]` float64 the blocks that tiles of prompts read and those that
    there were. `sinks` `[Hq]` are the model's attention sinks, which the last call brought.
    Where an eviction asks for them: `query_ring` `[B, Hq, S, D]`, `query_sums` `[B, Hq, D]` and
    `query_products` `[B, Hq, D, D]` of queries before RoPE (see `moments`), `hidden`
    `[B, 1, slots', hidden]`, the ring of attention inputs, and of the model's layer its `rope` and
    a function that gives its `output_weight` `[Hq, Dv, hidden]`.
    """

    index: int
    sizes: LayerSizes
    window: int
    slides: bool
    ring: Ring
    table: Tensor
    counts: Tensor
    evicted: Tensor
    pool: PagePool
    admission: Admission
    selection: Selection
    eviction: Eviction
    queries: Tensor | None = None
    numbers: Numbers | None = None
    selected: Tensor | None = None
    chosen: Tensor | None = None
    sinks: Tensor | None = None
    query_ring: Tensor | None = None
    query_sums: Tensor | None = None
    query_products: Tensor | None = None
    hidden: Tensor | None = None
    output_weight: Callable[[], Tensor] | None = None
    rope: Rope | None = None
    told_rope: bool = False  # None may be what was told

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def heads(self) -> Heads:
        """Page table and counts, as ops take them."""
        return Heads(self.table, self.counts)

    @property
    def rings(self) -> list[Tensor]:
        """What holds recent tokens, and all numbers; a call may have to put it back."""
        return [*self.ring, *self.beside_ring]

    @property
    def beside_ring(self) -> list[Tensor]:
        """`rings` but for the ring of keys, values and flags, which come first."""
        return [*self._asked.values(), *(self.numbers or ())]

    @property
    def _asked(self) -> dict[str, Tensor]:
        """What an eviction asked for beside numbers, by name."""
        named = {name: getattr(self, name) for name in ASKED}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors with one row a sequence by name, the page table excepted."""
        named = {f"ring_{name}": tensor for name, tensor in self.ring._asdict().items()}
        named |= {"counts": self.counts, "evicted": self.evicted} | self._asked
        if self.numbers is not None:
            named |= {"numbers": self.numbers.stored, "ring_numbers": self.numbers.recent}
        return named

    def take_buffers(self, table: Tensor, buffers: dict[str, Tensor]) -> None:
        """Makes these the layer's tensors; names as in `buffers`."""
        self.table, self.counts, self.evicted = table, buffers["counts"], buffers["evicted"]
        self.ring = Ring(*(buffers[f"ring_{name}"] for name in Ring._fields))
        if "numbers" in buffers:
            self.numbers = Numbers(buffers["numbers"], buffers["ring_numbers"])
        for name in ASKED:
            setattr(self, name, buffers.get(name))

    def snapshot(self) -> tuple[Tensor, ...]:
        """Copies of `rings`."""
        return tuple(t.clone() for t in self.rings)

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Puts a snapshot back."""
        for target, source in zip(self.rings, saved, strict=True):
            target.copy_(source)


def check_sinks(sinks: Tensor | None, heads: int, device: torch.device) -> None:
    """Raises unless `sinks` is None or a logit for each of `heads`, on `device`."""
    if sinks is None:
        return
    if tuple(sinks.shape) != (heads,) or not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks: wanted floats [{heads}], got {sinks.dtype} {list(sinks.shape)}")
    if sinks.device != device:
        raise ValueError(f"sinks: wanted a tensor on {device}, got {sinks.device}")
