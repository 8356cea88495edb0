"""CacheState: every device buffer of one batch of sequences, and what the host knows of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from .._arguments import rows_below
from .._fields import check_int
from ..exchange import ALONE, Exchange
from ..ops import POSITION_MASK, Bounds, Ops, Segments, pages_of
from ..spec import CacheSpec
from .devices import Device, Devices
from .layer import LayerStore
from .pool import PagePool
from .sequence import SequenceState


class Told(NamedTuple):
    """What a layer of a prompt call read, for layers that share its keys.

    `key`, `value` `[Hkv, Tk, D]`, `flags` `[Hkv, Tk]`: the recent tokens of `segments`; `bounds`
    what the host knows of the global ones; `dense`: whether every token is stored.
    """

    segments: Segments
    key: Tensor
    value: Tensor
    flags: Tensor
    bounds: Bounds | None
    dense: bool


@attrs.define(eq=False)
class Call:
    """One forward in flight, between `begin` and `commit`."""

    phase: str
    added: tuple[int, ...]  # real tokens each sequence gets
    valid: Tensor | None = None  # [B, T] bool, for decode calls
    segments: dict[tuple[int, torch.device], Segments] = attrs.field(factory=dict)
    undo: dict[int, tuple[Tensor, ...]] = attrs.field(factory=dict)  # rings before it, by layer
    before: dict[int, Tensor] = attrs.field(factory=dict)  # page counts before it, by layer
    held: dict[int, list[list[int]]] = attrs.field(factory=dict)  # the same on the host
    promised: dict[PagePool, int] = attrs.field(factory=dict)  # pages for all layers, or 0
    shared: dict[Any, Any] = attrs.field(factory=dict)  # what layers need alike, made once
    done: set[int] = attrs.field(factory=set)  # layers that ran
    told: dict[int, Told] = attrs.field(factory=dict)  # by layer, where others read its keys
    chosen: dict[int, Tensor] = attrs.field(factory=dict)  # of LayerStore's, what it adds
    # First and last query `[2, B]` to be settled from rings, by device.
    numbers: dict[torch.device, Tensor] = attrs.field(factory=dict)
    longest: list[int] | None = None  # of each sequence before it, where a call changes it
    columnwise: dict[int, list[Tensor]] = attrs.field(factory=dict)  # counts after each column

    @property
    def columns(self) -> int:
        """Columns of a decode call."""
        return 1 if self.valid is None else self.valid.shape[1]


class CacheState:
    """The cache of one batch; made by `CachePipeline.init`.

    `sequences` are the host's numbers, `devices` hold what kernels read of them. Policies never
    keep state: everything that changes is here. `exchange` reaches the caches of other heads.
    """

    def __init__(
        self,
        spec: CacheSpec,
        ops: Ops,
        devices: Devices,
        batch: int,
        exchange: Exchange = ALONE,
    ) -> None:
        self.spec, self.ops, self.devices, self.exchange = spec, ops, devices, exchange
        self.layers: list[LayerStore] = []
        self.sequences = [SequenceState() for _ in range(batch)]
        self.call: Call | None = None
        self.steps_reserved = 0
        self.looks_back: tuple[int, int, int, tuple[int, ...]] | None = None  # of a replay's fork

    @property
    def batch(self) -> int:
        """The number of sequences, those that are not active among them."""
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence."""
        return [row.length for row in self.sequences]

    @property
    def active(self) -> list[bool]:
        """Which sequences store what decode calls bring."""
        return [row.active for row in self.sequences]

    @property
    def pending_end(self) -> bool:
        """Whether a prompt-end eviction has yet to act."""
        return any(row.prompt_open for row in self.sequences)

    @property
    def managed(self) -> list[LayerStore]:
        """The layers that policies manage."""
        return [layer for layer in self.layers if not layer.slides]

    @property
    def generation(self) -> int:
        """Rises when a buffer that captured graphs read has moved."""
        return self.devices.generation + self._moves

    _moves = 0  # of this cache's own buffers

    def on(self, layer: LayerStore) -> Device:
        """What lies on a layer's device."""
        return self.devices.of(layer.device)

    def add_layer(self, layer: LayerStore) -> None:
        """Appends a layer, whose table holds pages from now on."""
        self.layers.append(layer)
        self.devices.add(layer)

    def moved(self) -> None:
        """Says that a buffer that captured graphs read has moved."""
        self._moves += 1

    def sync_devices(self) -> None:
        """Writes the host's lengths and active rows to every device, in place."""
        self.devices.write(self.sequences, self.spec.rollback)

    def sync_host(self) -> None:
        """Reads lengths back after captured steps, where only the device knows which rows ended."""
        for row, length, active in zip(self.sequences, *self.devices.read(), strict=True):
            row.length, row.active = length, active

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """A call inside counts tokens on no device: the host's numbers come back after it."""
        host = copy.deepcopy(self.sequences), self.steps_reserved
        try:
            yield
        finally:
            self.sequences, self.steps_reserved = host
            self.call = None

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Page counts and free pages are right even if what is inside is broken off anywhere."""
        try:
            yield
        except BaseException:
            self.steps_reserved = 0
            self.devices.recount()
            raise

    def finish(self, rows: Tensor | Sequence[int]) -> None:
        """Marks sequences as ended: later decode calls store nothing for them.

        `rows` are their numbers, a list or a tensor `[n]`.
        Raises ValueError, with nothing changed, for a row that the cache does not have.
        """
        ended = rows_below("rows", rows, self.batch)
        self.sync_host()
        for row in ended:
            self.sequences[row].active = False
        self.sync_devices()

    def resume(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Makes sequences `rows` `[n]`, by default all, active again, for a next turn.

        Raises ValueError, with nothing changed, for a row that the cache does not have.
        """
        going = range(self.batch) if rows is None else rows_below("rows", rows, self.batch)
        self.sync_host()
        for row in going:
            self.sequences[row].active = True
        self.steps_reserved = 0
        self.sync_devices()

    def widen(self, tokens: int) -> None:
        """Widens page tables to hold sequences of `tokens`, so that decoding need not."""
        wider = False
        for layer in self.managed:
            width, have = pages_of(tokens, layer.pool.page_size), layer.table.shape[2]
            if width > have:
                wide = layer.table.new_zeros(*layer.table.shape[:2], _bucket(width))
                wide[:, :, :have] = layer.table
                layer.table, wider = wide, True
        if wider:
            self.moved()
            for pool, entries in self.devices.count(
                self.managed, lambda layer: layer.table.numel()
            ).items():
                pool.presize(entries)

    def provide(self, pages: Mapping[PagePool, int]) -> None:
        """Makes sure that so many pages can be taken at once; what was reserved is used for it.

        Raises CapacityError with nothing changed.
        """
        self.devices.provide(pages)
        self.steps_reserved = 0

    def trim(self) -> None:
        """Gives memory of the page pools back that lies unused; forks that share them stay."""
        self.devices.trim()

    def kept(self, layer: int, row: int, head: int) -> Tensor:
        """Positions `[n]` int64 of the tokens that a head still holds, global ones and the
        window's, rising.

        `head` counts those of this rank. Raises ValueError for one of the three that there is not.
        """
        check_int("layer", layer, 0, len(self.layers) - 1)
        store = self.layers[layer]
        check_int("row", row, 0, self.batch - 1)
        check_int("head", head, 0, store.counts.shape[1] - 1)
        count, length = int(store.counts[row, head]), self.sequences[row].length
        ids = store.table[row, head, : pages_of(count, store.pool.page_size)]
        at = (self.ops.read_pages(store.pool.pages, ids)[2] & POSITION_MASK).flatten()[:count]
        near = torch.arange(max(length - store.window, 0), length, device=at.device)
        return torch.cat([at.long(), near])

    def reset(self) -> None:
        """Empties the cache and gives its pages back."""
        # All layers together: a release waits for the device, and each operation costs the host.
        for pool in self.devices.pools:
            layers = [x for x in self.layers if x.pool is pool]
            pool.release(torch.cat([x.table.flatten() for x in layers]))
            emptied = [(x.table, x.counts, x.evicted, x.ring.flags) for x in layers]
            torch._foreach_zero_([x for held in emptied for x in held])
        for layer in self.layers:
            layer.selected = layer.chosen = None
        self.sequences = [SequenceState() for _ in self.sequences]
        self.call, self.steps_reserved = None, 0
        self.sync_devices()
        self.devices.release()
        self.trim()

    def __del__(self) -> None:
        # A fork may share the pool. Collectors run at any moment, so the pool takes the pages
        # later.
        if hasattr(self, "devices"):
            self.devices.abandon()

    def shell(self, batch: int) -> CacheState:
        """A state with the same sizes and pools and no layers yet."""
        return CacheState(self.spec, self.ops, self.devices.resized(batch), batch, self.exchange)


def _bucket(width: int) -> int:
    """Table widths come in few sizes, so that captured graphs stay valid while a cache grows."""
    step = max(16, (1 << width.bit_length()) >> 3)
    return -(-width // step) * step
