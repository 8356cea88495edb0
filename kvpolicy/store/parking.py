"""Parking: a sequence waits in the host's memory and goes on later, bit for bit."""

from __future__ import annotations

import weakref

import attrs
import torch
from torch import Tensor

from .._arguments import check_kind
from ..ops import pages_of
from .checks import check_idle, check_row, check_state
from .layer import LayerStore
from .page_contents import write_pages
from .pool import PagePool
from .sequence import SequenceState
from .slots import check_empty, clear, make_wide, wipe
from .state import CacheState

# What a layer's dict holds beside its buffers of one sequence.
_PAGES = ("k", "v", "meta", "summary")


@attrs.frozen(eq=False)
class Parked:
    """A sequence outside the cache; `park` makes it, `unpark` takes it as often as one likes.

    `layers` are host tensors by name: the sequence's buffers and its pages, each page once, head
    after head. `pages` are their numbers by pool, in the pools' order. `sinks` are the attention
    sinks that each layer's last call brought.
    """

    sequence: SequenceState
    layers: tuple[dict[str, Tensor], ...]
    sinks: tuple[Tensor | None, ...]
    pages: tuple[int, ...]
    pools: tuple[weakref.ref[PagePool], ...]

    @property
    def tokens(self) -> int:
        """Real tokens of the sequence."""
        return self.sequence.length

    @property
    def nbytes(self) -> int:
        """Bytes that it takes of the host's memory."""
        return sum(x.untyped_storage().nbytes() for layer in self.layers for x in layer.values())


def park(state: CacheState, row: int) -> Parked:
    """Takes a sequence out of the cache into the host's memory and empties its slot.

    Rings are copied whole, of pages those in use. Pages that forks share stay with them. Raises
    ValueError for a row that the cache does not have, PhaseError while a call is in flight.
    """
    check_state(state)
    check_idle(state, "park")
    check_row(state, "row", row)
    state.sync_host()
    layers = tuple(_packed(state, layer, row) for layer in state.layers)
    pages = dict.fromkeys(state.devices.pools, 0)
    for layer, held in zip(state.layers, layers, strict=True):
        pages[layer.pool] += len(held["meta"])
    parked = Parked(
        attrs.evolve(state.sequences[row]),
        layers,
        tuple(layer.sinks for layer in state.layers),
        tuple(pages.values()),
        tuple(map(weakref.ref, pages)),
    )
    try:
        clear(state, [row])
        return parked
    except BaseException:
        if not state.sequences[row].length:  # nobody else has it
            unpark(state, row, parked)
        raise


def unpark(state: CacheState, slot: int, parked: Parked) -> None:
    """Puts a sequence back into an empty slot of its cache, or of one that shares the pools.

    Raises, with nothing changed:
        ValueError: the slot holds tokens or is none, or the sequence is of another cache's pools.
        CapacityError: its pages are more than are free, see `page_counts.free_pages`.
        PhaseError: a call is in flight.
    """
    check_state(state)
    check_idle(state, "unpark")
    check_row(state, "slot", slot)
    check_kind("parked", parked, Parked, "a sequence that park took out of a cache")
    pools = state.devices.pools
    if tuple(pool() for pool in parked.pools) != pools:
        raise ValueError("parked: wanted a sequence of a cache on the same pages, got another's")
    check_empty(state, slot)
    numbered = [held["numbers"] for held in parked.layers if "numbers" in held]
    with state.unbroken():
        make_wide(state, parked.tokens, max((x.shape[1] for x in numbered), default=0))
        state.provide(dict(zip(pools, parked.pages, strict=True)))
        try:
            for layer, held, sinks in zip(state.layers, parked.layers, parked.sinks, strict=True):
                layer.sinks = layer.sinks if sinks is None else sinks
                _unpack(state, layer, slot, held)
            state.sequences[slot] = attrs.evolve(parked.sequence)
            state.sync_devices()
        except BaseException:
            wipe(state, [slot])
            state.sync_devices()
            raise


def _packed(state: CacheState, layer: LayerStore, row: int) -> dict[str, Tensor]:
    """What a layer holds of a sequence, on the host."""
    found = {name: x[row] for name, x in layer.buffers.items()}
    if "numbers" in found:
        found["numbers"] = found["numbers"][:, : int(layer.counts[row].amax())]
    ids = layer.table[row][_used(layer, layer.counts[row])]
    contents = [*state.ops.read_pages(layer.pool.pages, ids)]
    if layer.pool.summary is not None:
        contents.append(state.ops.read_summary(layer.pool.pages, ids))
    found |= zip(_PAGES, contents, strict=False)
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in found.items()}


def _unpack(state: CacheState, layer: LayerStore, slot: int, held: dict[str, Tensor]) -> None:
    """Writes what `_packed` found into an empty slot; its pages are known to be free."""
    for name, into in layer.buffers.items():
        if name == "numbers":
            into[slot, :, : held[name].shape[1]].copy_(held[name])
        else:
            into[slot].copy_(held[name])
    if not len(held["meta"]):
        return
    k, v, meta, *summary = (held[name].to(layer.device) for name in _PAGES if name in held)
    ids = layer.pool.take(len(meta))
    layer.table[slot].masked_scatter_(_used(layer, layer.counts[slot]), ids)
    write_pages(state, layer, ids, k, v, meta)
    if summary:
        state.ops.write_summary(layer.pool.pages, ids, summary[0])


def _used(layer: LayerStore, counts: Tensor) -> Tensor:
    """Which places `[Hkv, M]` of a sequence's table name pages, its heads holding `counts`."""
    column = torch.arange(layer.table.shape[2], device=layer.device)
    return column < pages_of(counts, layer.pool.page_size)[:, None]
