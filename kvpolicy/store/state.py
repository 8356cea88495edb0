"""CacheState: every device buffer of one batch of sequences."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ..ops import POSITION_MASK
from ..spec import CacheSpec
from .layer import LayerStore
from .pages import PagePool
from .trimming import trim

if TYPE_CHECKING:
    from ..ops import Ops, Segments


# Lists of a CacheState with one entry a sequence, on the host.
HOST = (
    "lengths", "active", "floor", "reached", "checked", "pending", "overshoot", "cap_evicted",
)  # fmt: skip


@attrs.define(eq=False)
class Call:
    """One forward in flight, between `begin` and `commit`."""

    phase: str
    added: tuple[int, ...]  # real tokens each sequence gets
    segments: dict[torch.device, Segments] = attrs.field(factory=dict)
    undo: dict[int, tuple[Tensor, ...]] = attrs.field(factory=dict)
    before: dict[int, Tensor] = attrs.field(factory=dict)  # page counts before the call, by layer
    held: dict[int, list[list[int]]] = attrs.field(factory=dict)  # the same on the host
    valid: Tensor | None = None  # [B, T] bool, for decode calls
    done: set[int] = attrs.field(factory=set)  # layers that ran


class CacheState:
    """The cache of one batch; made by `CachePipeline.init`.

    `lengths` counts the real tokens of each sequence on the host; `lengths_on` holds the same on
    every device in use. Policies never keep state: everything that changes is here.
    """

    def __init__(self, spec: CacheSpec, ops: Ops, batch: int) -> None:
        self.spec, self.ops = spec, ops
        self.layers: list[LayerStore] = []
        self.lengths: list[int] = [0] * batch
        self.active: list[bool] = [True] * batch
        self.floor: list[int] = [0] * batch  # length at the last eviction
        self.reached: list[int] = [0] * batch  # rings lost what lies `rollback` before this length
        self.checked: list[int] = [0] * batch  # length when an eviction was last considered
        self.pending: list[bool] = [False] * batch  # prompts that have not ended
        self.overshoot: list[int] = [0] * batch  # most tokens of a head above `max_tokens`
        self.cap_evicted: list[int] = [0] * batch  # tokens dropped because a cap was reached
        self.lengths_on: dict[torch.device, Tensor] = {}
        self.active_on: dict[torch.device, Tensor] = {}
        self.cu_one: dict[torch.device, Tensor] = {}  # cu_seqlens of one token a sequence
        self.pools: dict[torch.device, PagePool] = {}
        self.call: Call | None = None
        self.steps_reserved = 0

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def pending_end(self) -> bool:
        """Whether a prompt-end eviction has yet to act."""
        return any(self.pending)

    @property
    def generation(self) -> int:
        """Rises when a buffer that captured graphs read has moved."""
        return sum(pool.generation for pool in self.pools.values())

    def sync_devices(self) -> None:
        """Writes the host's lengths and active rows to every device, in place."""
        for device, tensor in self.lengths_on.items():
            tensor.copy_(torch.tensor(self.lengths, dtype=torch.int64, device=device))
            self.active_on[device].copy_(torch.tensor(self.active, device=device))

    def sync_host(self) -> None:
        """Reads lengths back after captured steps, where only the device knows which rows ended."""
        device = next(iter(self.lengths_on))
        self.lengths = self.lengths_on[device].tolist()
        self.active = self.active_on[device].tolist()

    def finish(self, rows: Tensor | list[int]) -> None:
        """Marks sequences as ended: later decode calls store nothing for them."""
        for row in rows.tolist() if isinstance(rows, Tensor) else rows:
            self.active[row] = False
        self.sync_devices()

    def resume(self) -> None:
        """Makes every sequence active again, for a next turn."""
        self.active = [True] * self.batch
        self.steps_reserved = 0
        self.sync_devices()

    def reserve(self, tokens: int) -> None:
        """Widens page tables to hold sequences of `tokens`, so that decoding need not."""
        width, wider = -(-tokens // self.spec.page_size), False
        for layer in self.layers:
            have = layer.table.shape[2]
            if not layer.slides and width > have:
                wide = layer.table.new_zeros(*layer.table.shape[:2], _bucket(width))
                wide[:, :, :have] = layer.table
                layer.table, wider = wide, True
                layer.pool.generation += 1
        for pool in self.pools.values():
            if wider and not pool.moving:
                pool.presize(sum(x.table.numel() for x in self.layers if x.pool is pool))

    def reserve_pages(self, steps: int) -> None:
        """Makes sure that `steps` decoded tokens a sequence find a page each time one is needed."""
        for pool, count in self.pages_for(steps).items():
            pool.promise(self, count)
        self.steps_reserved = steps

    def pages_for(self, steps: int) -> dict[PagePool, int]:
        """Pages that `steps` decoded tokens a sequence may need (reads the device)."""
        size, found = self.spec.page_size, {}
        for pool in self.pools.values():
            need: Tensor | int = 0
            for layer in self.layers:
                if not layer.slides and layer.pool is pool:
                    need = need + _pages(layer.counts + steps, size) - _pages(layer.counts, size)
            found[pool] = int(need.sum()) if isinstance(need, Tensor) else 0
        return found

    def horizon(self, most: int) -> int:
        """Decoded tokens to reserve for at once: `interval`, or up to `most` for 5 % of the pages.

        Reserving reads the device, so a long horizon keeps the host out of decoding.
        """
        steps = most
        for pool in self.pools.values():
            heads = sum(x.counts.numel() for x in self.layers if x.pool is pool and not x.slides)
            if heads:
                steps = min(steps, pool.used // (20 * heads) * self.spec.page_size)
        return max(steps, self.spec.interval)

    def secure(self, pages: Mapping[PagePool, int]) -> None:
        """Makes sure that so many pages can be taken at once, those promised for decoding included.

        Raises CapacityError with nothing changed.
        """
        for pool, count in pages.items():
            pool.promise(self, count)
        for pool in pages:
            pool.holders[self] = 0
            pool.unseen.forget()
        self.steps_reserved = 0

    def kept(self, layer: int, row: int, head: int) -> Tensor:
        """Positions of the tokens that a head still holds, global ones and the window's, rising."""
        store = self.layers[layer]
        count, size = int(store.counts[row, head]), self.spec.page_size
        ids = store.table[row, head, : -(-count // size)]
        at = (self.ops.read_pages(store.pool.pages, ids)[2] & POSITION_MASK).flatten()[:count]
        length = self.lengths[row]
        near = torch.arange(max(length - store.window, 0), length, device=at.device)
        return torch.cat([at.long(), near])

    def reset(self) -> None:
        """Empties the cache and gives its pages back."""
        for layer in self.layers:
            layer.pool.release(layer.table.flatten())
            layer.table.zero_()
            layer.counts.zero_()
            layer.evicted.zero_()
            layer.ring_flags.zero_()
            layer.selected = None
        self.lengths = [0] * self.batch
        self.floor, self.reached = [0] * self.batch, [0] * self.batch
        self.checked, self.pending = [0] * self.batch, [False] * self.batch
        self.overshoot, self.cap_evicted = [0] * self.batch, [0] * self.batch
        self.call, self.steps_reserved = None, 0
        self.resume()
        for pool in self.pools.values():
            pool.holders[self] = 0
            trim(pool)

    def __del__(self) -> None:
        # A fork may share the pool. Collectors run at any moment, so the pool takes the pages
        # later.
        for layer in getattr(self, "layers", []):
            layer.pool.orphans.append(layer.table)

    def shell(self, batch: int) -> CacheState:
        """A state with the same sizes and pools and no layers yet."""
        new = copy.copy(self)
        new.__dict__ = dict(self.__dict__)
        new.layers, new.call, new.steps_reserved = [], None, 0
        new.lengths, new.active, new.floor = [0] * batch, [True] * batch, [0] * batch
        new.reached, new.checked, new.pending = [0] * batch, [0] * batch, [False] * batch
        new.overshoot, new.cap_evicted = [0] * batch, [0] * batch
        new.lengths_on = {d: t.new_zeros(batch) for d, t in self.lengths_on.items()}
        new.active_on = {d: t.new_ones(batch) for d, t in self.active_on.items()}
        new.cu_one = {
            d: torch.arange(batch + 1, dtype=torch.int32, device=d) for d in self.lengths_on
        }
        for pool in self.pools.values():
            pool.holders[new] = 0
        return new


def _pages(counts: Tensor, size: int) -> Tensor:
    return (counts + size - 1) // size


def _bucket(width: int) -> int:
    """Table widths come in few sizes, so that captured graphs stay valid while a cache grows."""
    step = max(16, (1 << width.bit_length()) >> 3)
    return -(-width // step) * step
