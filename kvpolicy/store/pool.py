"""The page pool: extents of equal slabs, a free stack and reference counts, all on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..errors import CapacityError
from ..ops import Pages
from .extents import SLAB_PAGES, Extent, slab_starts, widened
from .free_pages import FreePages
from .lease import Lease

CopyPages = Callable[[Pages, Tensor, Tensor], None]
# A single allocation is at most this or 1/32 of the pool: trimming drops whole ones.
EXTENT_PAGES = 1024


class PagePool:
    """Pages of one device, shared by all layers and by forked caches.

    With `moving` growth the pool is one extent that is reallocated (the reference reads pages by
    plain indexing); otherwise growth appends extents and nothing moves, so captured graphs stay
    valid. `copy` is the backend's `copy_pages`.
    """

    def __init__(
        self,
        *,
        page_size: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
        summary: tuple[int, torch.dtype] | None,
        moving: bool,
        copy: CopyPages,
    ) -> None:
        self.page_size, self.head_dim, self.value_dim = page_size, head_dim, value_dim or head_dim
        self.copy = copy
        self.dtype, self.device, self.moving = dtype, device, moving
        self.summary = summary
        self.limit: int | None = None  # most pages, the null page not counted
        self.generation = 0  # rises when a buffer that captured graphs read has moved
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()  # of the caches that use the pool
        # Tables of caches that are gone, whose pages are still held.
        self.orphans: list[Tensor] = []
        self.known = FreePages()
        self.extents = [self._extent(SLAB_PAGES)]
        for null in self.extents[0][:2]:  # the reference reads it, with weight 0
            null[0] = 0
        self.capacity = SLAB_PAGES
        self.top = torch.zeros(1, dtype=torch.int32, device=device)
        self.free = torch.zeros(SLAB_PAGES, dtype=torch.int32, device=device)
        self.refs = torch.zeros(SLAB_PAGES, dtype=torch.int32, device=device)
        self.slabs = torch.zeros(4, 4, dtype=torch.int64, device=device)
        self.push(torch.arange(1, SLAB_PAGES, dtype=torch.int32, device=device))
        self.refresh()

    def _extent(self, count: int) -> Extent:
        shape = (count, self.page_size)
        make = lambda *s, dtype: torch.empty(*s, dtype=dtype, device=self.device)  # noqa: E731
        k = make(*shape, self.head_dim, dtype=self.dtype)
        v = make(*shape, self.value_dim, dtype=self.dtype)
        summary = make(count, self.summary[0], dtype=self.summary[1]) if self.summary else None
        return k, v, make(*shape, dtype=torch.int32), summary

    def refresh(self) -> None:
        """Makes `pages` what kernels are to see now."""
        first = self.extents[0]
        self.pages = Pages(
            *first,
            slabs=self.slabs,
            slab_pages=SLAB_PAGES,
            free=self.free,
            top=self.top,
            refs=self.refs,
        )

    def push(self, ids: Tensor) -> None:
        """Puts pages on the free stack; the host does not wait for the device."""
        place = self.top + torch.arange(ids.numel(), device=self.device)
        self.free.index_copy_(0, place, ids.flip(0))
        self.top += ids.numel()
        self.known.add(ids.numel())

    def drain(self) -> None:
        """Takes back the pages of caches that are gone."""
        if self.orphans:  # together, since a release waits for the device
            gone = [self.orphans.pop().flatten() for _ in range(len(self.orphans))]
            self.release(torch.cat(gone))

    def provide_for_write(self, count: int, free: int) -> None:
        """Makes `count` pages free for the write to come, if `free` pages are free now."""
        free = self.provide(count, free)
        if self.moving and count > 1:  # rising ids, which the reference can read without a copy
            self.free[:free] = self.free[:free].sort(descending=True).values
        self.known.learn(free - count)

    @property
    def available(self) -> int:
        """Free pages (reads the device)."""
        self.drain()
        return int(self.top)

    @property
    def used(self) -> int:
        """Pages that some head holds (reads the device)."""
        return self.capacity - 1 - self.available

    @property
    def kv_bytes(self) -> int:
        """Bytes of one page's keys and values."""
        return sum(x[0].nbytes for x in self.extents[0][:2])

    @property
    def meta_bytes(self) -> int:
        """Bytes of one page's positions."""
        return self.extents[0][2][0].nbytes

    @property
    def summary_bytes(self) -> int:
        """Bytes of one page's summary."""
        summary = self.extents[0][3]
        return 0 if summary is None else summary[0].nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.kv_bytes + self.meta_bytes + self.summary_bytes

    def limit_to(self, max_bytes: int) -> None:
        """Limits the pool to `max_bytes`, the null page included."""
        least = SLAB_PAGES * self.page_bytes
        if max_bytes < least:
            raise ValueError(
                f"max_bytes: wanted at least {least}, the first {SLAB_PAGES} pages, got {max_bytes}"
            )
        self.limit = max_bytes // self.page_bytes - 1

    @property
    def room(self) -> int | None:
        """Pages that can still be taken, growth included and reserved ones left out."""
        most = self._most()
        if most is None:
            return None
        return self.available + most - self.capacity - self.reserved

    def lease(self) -> Lease:
        """A new cache's part of the pool; it ends with the cache that keeps it."""
        lease = Lease()
        self.leases.add(lease)
        return lease

    @property
    def reserved(self) -> int:
        """Pages that are reserved for caches."""
        return sum(lease.reserved for lease in self.leases)

    def tables(self) -> list[Tensor]:
        """Every page table that holds pages, once: a cache may become an orphan meanwhile."""
        leased = [layer.table for lease in list(self.leases) for layer in lease.layers]
        return list({id(table): table for table in [*leased, *self.orphans]}.values())

    def reserve(self, lease: Lease, count: int, free: int | None = None) -> None:
        """Keeps `count` free pages for a cache, beside those reserved for others.

        `free` as in `provide`. Raises CapacityError, with its earlier reservation as it was, at the
        limit.
        """
        before, lease.reserved = lease.reserved, 0
        self.known.forget()  # what was taken of an earlier reservation is no longer covered by it
        try:
            self.provide(count, free)
            before = count
        finally:
            lease.reserved = before

    def fits(self, count: int, free: int) -> bool:
        """Whether the limit lets `count` pages be free and not reserved, where `free` are now."""
        most = self._most()
        return most is None or self.capacity + count + self.reserved - free <= most

    def provide(self, count: int, free: int | None = None) -> int:
        """Grows until `count` pages are free and not reserved; CapacityError at the limit.

        `free` pages are known to be free; without it they are read from the device. Returns how
        many are free then.
        """
        free = self.available if free is None else free
        missing = count + self.reserved - free
        if count == 0 or missing <= 0:
            return free
        most = self._most()
        if not self.fits(count, free):
            raise CapacityError(
                f"{count} more pages wanted, {free} free and {self.used} in use of at "
                f"most {self.limit}; raise the cap, admit less or add an eviction"
            )
        # Whole slabs; growth by a sixteenth only where that is a slab or more.
        missing = -(-missing // SLAB_PAGES) * SLAB_PAGES
        missing = max(missing, self.capacity // 16 // SLAB_PAGES * SLAB_PAGES)
        if most is not None:
            missing = min(missing, most - self.capacity)
        before = self.capacity
        try:
            if self.moving:
                self._grow_moving(missing)
            else:
                self._grow_appending(-(-missing // SLAB_PAGES) * SLAB_PAGES)
        finally:
            self.refresh()  # of what was allocated before the device's memory ran out
        return free + self.capacity - before

    def _most(self) -> int | None:
        """Largest capacity that the limit allows; appended memory comes in whole slabs."""
        if self.limit is None:
            return None
        return self.limit + 1 if self.moving else (self.limit + 1) // SLAB_PAGES * SLAB_PAGES

    def _grow_moving(self, count: int) -> None:
        self._lengthen(count)
        try:
            self.replace(lambda store: self._longer(store, count))
        except BaseException:  # what is longer already takes memory that nobody counts
            kept = self.capacity
            self.replace(lambda store: store[:kept].clone() if len(store) > kept else store)
            raise
        self._add_ids(count, self.extents)

    def _longer(self, store: Tensor, count: int) -> Tensor:
        """A copy with room for `count` more pages."""
        new = store.new_empty(self.capacity + count, *store.shape[1:])
        new[: self.capacity] = store[: self.capacity]
        return new

    def replace(self, make: Callable[[Tensor], Tensor]) -> None:
        """Replaces keys, values, positions and summaries of the first extent, one after the other:
        only one of them is held twice meanwhile."""
        for place in range(len(self.extents[0])):
            stores: list[Tensor | None] = [*self.extents[0]]
            if (store := stores[place]) is not None:
                stores[place] = make(store)
                self.extents = [cast(Extent, tuple(stores)), *self.extents[1:]]
                self.refresh()
            del stores, store  # nothing holds the old one any more

    def _grow_appending(self, count: int) -> None:
        """Allocates so many pages, piece by piece; the device is told once."""
        made: list[Extent] = []
        pages, starts = self.capacity, []
        try:
            while pages < self.capacity + count:
                largest = max(EXTENT_PAGES, pages // 32 // SLAB_PAGES * SLAB_PAGES)
                size = min(self.capacity + count - pages, largest)
                made.append(self._extent(size))
                starts.append(slab_starts(self.extents[0], made[-1], size // SLAB_PAGES))
                pages += size
        finally:  # what was allocated before the device's memory ran out stays
            if made:
                self._join(pages - self.capacity, made, torch.cat(starts))

    def _join(self, count: int, extents: list[Extent], starts: Tensor) -> None:
        """Makes new extents, with `count` pages in slabs at `starts`, the pool's."""
        self._lengthen(count)
        first, rows = self.capacity // SLAB_PAGES, count // SLAB_PAGES
        if first + rows > self.slabs.shape[0]:
            self.slabs = widened(self.slabs, 2 * (first + rows))
            self.generation += 1
        self.slabs[first : first + rows] = starts.to(self.device, non_blocking=True)
        self._add_ids(count, [*self.extents, *extents])

    def _lengthen(self, count: int) -> None:
        """Makes room for `count` more pages in free stack and reference counts."""
        if self.capacity + count > self.free.numel():
            size = self.capacity + count if self.moving else 2 * (self.capacity + count)
            self.free, self.refs = widened(self.free, size), widened(self.refs, size)
            self.generation += 1

    def _add_ids(self, count: int, extents: list[Extent]) -> None:
        first = self.capacity
        self.refs[first : first + count] = 0
        # Together: what is broken off between them would leave one without the other.
        self.extents, self.capacity = extents, first + count
        self.push(torch.arange(first, first + count, dtype=torch.int32, device=self.device))

    def presize(self, pages: int) -> None:
        """Makes free stack and slab table long enough for `pages`, so that growth moves nothing.

        Where growth moves pages anyway there is nothing to do.
        """
        pages = pages if self.limit is None else min(pages, self.limit)
        if not self.moving and pages + SLAB_PAGES > self.free.numel():
            size = pages + SLAB_PAGES
            slabs = widened(self.slabs, max(-(-size // SLAB_PAGES), self.slabs.shape[0]))
            self.free, self.refs = widened(self.free, size), widened(self.refs, size)
            self.slabs = slabs
            self.generation += 1
            self.refresh()

    def take(self, count: int) -> Tensor:
        """Takes `count` pages, int32 ids `[count]`, growing if needed."""
        self.provide_for_write(count, self.available)
        self.known.forget()
        top = int(self.top) - count
        ids = self.free[top : top + count].flip(0)
        self.top.fill_(top)
        self.refs[ids.long()] = 1
        if self.moving:  # unused slots stay finite, see the reference's take_pages
            self.pages.k[ids.long()] = 0
            self.pages.v[ids.long()] = 0
        return ids

    def share(self, ids: Tensor) -> None:
        """Counts one more holder for pages `ids` `[N]` (repeats allowed, the null page ignored)."""
        ids = ids[ids > 0].long()
        self.refs.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def release(self, ids: Tensor) -> None:
        """Counts one holder less for pages `ids` `[N]`; pages without holders become free."""
        self.known.forget()
        ids = ids[ids > 0].long()
        if ids.numel():
            held = self.refs > 0
            self.refs.index_add_(0, ids, torch.full_like(ids, -1, dtype=torch.int32))
            self.push((held & (self.refs == 0)).nonzero().squeeze(1).int())
