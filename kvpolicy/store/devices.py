"""What a cache keeps on its devices beside its layers: lengths, active flags, parts of pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from .layer import LayerStore
from .lease import Lease
from .pool import PagePool
from .recount import recount
from .sequence import SequenceState
from .trimming import trim

SPARE_SHARE = 20  # a long reservation may be one page in so many of those in use


@attrs.define(eq=False)
class Device:
    """One device: `lengths`, `final` `[B]` int64, `active` `[B]` bool, `cu_one` `[B + 1]` int32.

    `cu_one` are the cu_seqlens of one token a sequence. `final` is `SequenceState.final` as far as
    it does not follow from `lengths`.
    """

    lengths: Tensor
    final: Tensor
    active: Tensor
    cu_one: Tensor

    @classmethod
    def empty(cls, device: torch.device, batch: int) -> Device:
        return cls(
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            final=torch.zeros(batch, dtype=torch.int64, device=device),
            active=torch.ones(batch, dtype=torch.bool, device=device),
            cu_one=torch.arange(batch + 1, dtype=torch.int32, device=device),
        )


class Devices:
    """All devices of one cache, so that nothing else knows how many there are."""

    def __init__(
        self, devices: Iterable[torch.device], pools: Iterable[PagePool], batch: int
    ) -> None:
        self._each = {device: Device.empty(device, batch) for device in devices}
        self._leases: dict[PagePool, Lease] = {pool: pool.lease() for pool in pools}

    def of(self, device: torch.device) -> Device:
        """What lies on `device`."""
        return self._each[device]

    def resized(self, batch: int) -> Devices:
        """The same devices and pools for a cache of `batch` sequences."""
        return Devices(self._each, self._leases, batch)

    def add(self, layer: LayerStore) -> None:
        """Says that the table of `layer` holds pages."""
        self._leases[layer.pool].layers.append(layer)

    def clear(self) -> None:
        """Says that no table of this cache holds pages any more: somebody else counts them."""
        for lease in self._leases.values():
            lease.layers.clear()

    def abandon(self) -> None:
        """Leaves the pages to the pools, for when the cache is gone."""
        for pool, lease in self._leases.items():
            pool.orphans.extend(layer.table for layer in lease.layers)

    def adopt(self, other: Devices) -> None:
        """Takes over the buffers of `other` where they differ in size; what they hold is stale."""
        for device, own in self._each.items():
            if own.lengths.shape != other.of(device).lengths.shape:
                self._each[device] = other.of(device)

    @property
    def nbytes(self) -> int:
        """Bytes of lengths, flags and offsets."""
        tensors = (t for own in self._each.values() for t in attrs.astuple(own, recurse=False))
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def write(self, sequences: Sequence[SequenceState], rollback: int) -> None:
        """Makes lengths, active flags and what is final those of the host, in place."""
        self.write_final(sequences, rollback)
        rows = list(sequences)
        for device, own in self._each.items():
            lengths = [row.length for row in rows]
            own.lengths.copy_(torch.tensor(lengths, dtype=torch.int64, device=device))
            own.active.copy_(torch.tensor([row.active for row in rows], device=device))

    def write_final(self, sequences: Sequence[SequenceState], rollback: int) -> None:
        """Makes what is final that of the host, in place."""
        final = [max(row.evicted_at, row.longest - rollback, 0) for row in sequences]
        for device, own in self._each.items():
            own.final.copy_(torch.tensor(final, dtype=torch.int64, device=device))

    def read(self) -> tuple[list[int], list[bool]]:
        """Lengths and active flags as the devices have them; waits for one."""
        own = next(iter(self._each.values()))
        return own.lengths.tolist(), own.active.tolist()

    def activate(self, active: Tensor) -> None:
        """Makes the flags `active` `[B]` without the host looking at them."""
        for own in self._each.values():
            own.active.copy_(active)

    def advance(self, valid: Tensor | None) -> None:
        """Counts a decode call: one token for each active sequence, or those `valid` `[B, T]`."""
        for device, own in self._each.items():
            if valid is None:
                own.lengths.add_(own.active)
            else:
                own.lengths.add_((valid.to(device) & own.active[:, None]).sum(1))

    @property
    def pools(self) -> tuple[PagePool, ...]:
        """Every pool that layers of the cache take pages from."""
        return tuple(self._leases)

    @property
    def generation(self) -> int:
        """Rises when a buffer of a pool that captured graphs read has moved."""
        return sum(pool.generation for pool in self._leases)

    def reserve(self, pages: Mapping[PagePool, int]) -> None:
        """Keeps so many pages of each pool for this cache.

        Raises CapacityError, with earlier reservations as they were, at the limit of one.
        """
        before = [(lease, lease.reserved) for lease in self._leases.values()]
        try:
            for pool, count in pages.items():
                pool.reserve(self._leases[pool], count)
        except BaseException:
            for lease, reserved in before:
                lease.reserved = reserved
            raise

    def promise(self, pool: PagePool, pages: int, free: int) -> None:
        """Keeps pages of one pool, `free` of which are free, for layers to take as they write."""
        pool.reserve(self._leases[pool], pages, free)

    def took(self, pool: PagePool, pages: int) -> None:
        """A layer takes at most so many of the pages that it was promised; the rest are free."""
        self._leases[pool].reserved -= pages

    def release(self) -> None:
        """Gives back what was reserved for this cache."""
        for pool, lease in self._leases.items():
            lease.reserved = 0
            pool.known.forget()

    def provide(self, pages: Mapping[PagePool, int]) -> None:
        """Makes sure that so many pages can be taken at once, those reserved so far included.

        Raises CapacityError with nothing changed; else nothing is reserved any more.
        """
        self.reserve(pages)
        self.release()

    def settle(self) -> None:
        """A prompt call has ended: what it took is checked, and the host looks anew."""
        for pool in self._leases:
            pool.known.settle()
            pool.known.forget()

    def free(self) -> dict[PagePool, int | None]:
        """Pages that can be taken beside those reserved for other caches; None: as many as fit."""
        rooms = {pool: pool.room for pool in self._leases}
        return {
            pool: None if room is None else room + self._leases[pool].reserved
            for pool, room in rooms.items()
        }

    def drain(self) -> None:
        """Takes back pages of caches that are gone."""
        for pool in self._leases:
            pool.drain()

    def trim(self) -> None:
        """Gives memory of the pools back that lies unused."""
        for pool in self._leases:
            trim(pool)

    def recount(self) -> None:
        """Makes the pools right after something was broken off; see `recount.recount`."""
        for pool in self._leases:
            recount(pool)

    def count(
        self, layers: Iterable[LayerStore], need: Callable[[LayerStore], Tensor | int]
    ) -> dict[PagePool, int]:
        """Pages by pool: the sums of `need(layer)` over its layers; waits once a pool."""
        found: dict[PagePool, Tensor | int] = dict.fromkeys(self._leases, 0)
        for layer in layers:
            wanted = need(layer)
            total = wanted.sum() if isinstance(wanted, Tensor) else wanted
            found[layer.pool] = found[layer.pool] + total
        return {pool: int(total) for pool, total in found.items()}

    def spare_steps(self, layers: Iterable[LayerStore], most: int) -> int:
        """Decoded tokens, at most `most`, whose pages are few beside those in use."""
        heads = dict.fromkeys(self._leases, 0)
        for layer in layers:
            heads[layer.pool] += layer.counts.numel()
        for pool, count in heads.items():
            if count:
                most = min(most, pool.used // (SPARE_SHARE * count) * pool.page_size)
        return most
