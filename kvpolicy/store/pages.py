"""The page pool: extents of equal slabs, a free stack and reference counts, all on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CapacityError
from ..ops import Pages
from .extents import SLAB_PAGES, Extent, slab_starts, widened
from .unseen import Unseen

if TYPE_CHECKING:
    from .state import CacheState

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
        dtype: torch.dtype,
        device: torch.device,
        summary: tuple[int, torch.dtype] | None,
        moving: bool,
        copy: CopyPages,
    ) -> None:
        self.page_size, self.head_dim = page_size, head_dim
        self.copy = copy
        self.dtype, self.device, self.moving = dtype, device, moving
        self.summary = summary
        self.limit: int | None = None  # most pages, the null page not counted
        self.generation = 0  # rises when a buffer that captured graphs read has moved
        # Caches that use the pool, with the pages promised to each until it reserves again.
        self.holders: weakref.WeakKeyDictionary[CacheState, int] = weakref.WeakKeyDictionary()
        # Tables of caches that are gone, whose pages are still held.
        self.orphans: list[Tensor] = []
        self.unseen = Unseen()
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
        v = make(*shape, self.head_dim, dtype=self.dtype)
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
        self.unseen.add(ids.numel())

    def drain(self) -> None:
        """Takes back the pages of caches that are gone."""
        while self.orphans:
            self.release(self.orphans.pop().flatten())

    def make_free(self, count: int, free: int) -> None:
        """Makes `count` pages free for the write to come, if `free` pages are free now."""
        free = self.ensure(count, free)
        if self.moving and count > 1:  # rising ids, which the reference can read without a copy
            self.free[:free] = self.free[:free].sort(descending=True).values
        self.unseen.learn(free - count)

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
    def page_bytes(self) -> int:
        """Bytes of one page: keys, values, positions and summary."""
        return sum(x[0].nbytes for x in self.extents[0] if x is not None)

    def cap(self, max_bytes: int) -> None:
        """Limits the pool to `max_bytes`, the null page included."""
        least = SLAB_PAGES * self.page_bytes
        if max_bytes < least:
            raise ValueError(
                f"max_bytes: wanted at least {least}, the first {SLAB_PAGES} pages, got {max_bytes}"
            )
        self.limit = max_bytes // self.page_bytes - 1

    @property
    def room(self) -> int | None:
        """Pages that can still be taken, growth included and those promised left out."""
        most = self._most()
        if most is None:
            return None
        return self.available + most - self.capacity - sum(self.holders.values())

    def promise(self, holder: CacheState, count: int) -> None:
        """Keeps `count` free pages for `holder`, beside those promised to others."""
        before = self.holders.get(holder, 0)
        self.holders[holder] = 0
        self.unseen.forget()  # what was taken of an earlier promise is no longer covered by it
        try:
            self.ensure(count)
            before = count
        finally:
            self.holders[holder] = before

    def ensure(self, count: int, free: int | None = None) -> int:
        """Grows until `count` pages are free and not promised; CapacityError at the limit.

        `free` pages are known to be free; without it they are read from the device. Returns how
        many are free then.
        """
        free = self.available if free is None else free
        missing = count + sum(self.holders.values()) - free
        if count == 0 or missing <= 0:
            return free
        most = self._most()
        if most is not None and self.capacity + missing > most:
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
            while missing > 0 and not self.moving:
                largest = max(EXTENT_PAGES, self.capacity // 32 // SLAB_PAGES * SLAB_PAGES)
                self._grow_appending(-(-min(missing, largest) // SLAB_PAGES) * SLAB_PAGES)
                missing -= largest
        finally:
            self.refresh()  # of what was allocated before the device's memory ran out
        return free + self.capacity - before

    def _most(self) -> int | None:
        """Largest capacity that the limit allows; appended memory comes in whole slabs."""
        if self.limit is None:
            return None
        return self.limit + 1 if self.moving else (self.limit + 1) // SLAB_PAGES * SLAB_PAGES

    def _grow_moving(self, count: int) -> None:
        old, new = self.extents[0], self._extent(self.capacity + count)
        for source, target in zip(old, new, strict=True):
            if source is not None and target is not None:
                target[: self.capacity] = source
        self._lengthen(count)
        self.extents = [new]
        self._add_ids(count)

    def _grow_appending(self, count: int) -> None:
        extent = self._extent(count)
        self._lengthen(count)
        first = self.capacity // SLAB_PAGES
        rows = count // SLAB_PAGES
        if first + rows > self.slabs.shape[0]:
            self.slabs = widened(self.slabs, 2 * (first + rows))
            self.generation += 1
        self.slabs[first : first + rows] = slab_starts(self.extents[0], extent, rows).to(
            self.device, non_blocking=True
        )
        self.extents.append(extent)
        self._add_ids(count)

    def _lengthen(self, count: int) -> None:
        """Makes room for `count` more pages in free stack and reference counts."""
        if self.capacity + count > self.free.numel():
            size = self.capacity + count if self.moving else 2 * (self.capacity + count)
            self.free, self.refs = widened(self.free, size), widened(self.refs, size)
            self.generation += 1

    def _add_ids(self, count: int) -> None:
        self.refs[self.capacity : self.capacity + count] = 0
        new = torch.arange(
            self.capacity, self.capacity + count, dtype=torch.int32, device=self.device
        )
        self.push(new)
        self.capacity += count

    def presize(self, pages: int) -> None:
        """Makes free stack and slab table long enough for `pages`, so that growth moves nothing."""
        if pages + SLAB_PAGES > self.free.numel():
            size = pages + SLAB_PAGES
            slabs = widened(self.slabs, max(-(-size // SLAB_PAGES), self.slabs.shape[0]))
            self.free, self.refs = widened(self.free, size), widened(self.refs, size)
            self.slabs = slabs
            self.generation += 1
            self.refresh()

    def take(self, count: int) -> Tensor:
        """Takes `count` pages, int32 ids `[count]`, growing if needed."""
        self.make_free(count, self.available)
        self.unseen.forget()
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
        self.unseen.forget()
        ids = ids[ids > 0].long()
        if ids.numel():
            held = self.refs > 0
            self.refs.index_add_(0, ids, torch.full_like(ids, -1, dtype=torch.int32))
            self.push((held & (self.refs == 0)).nonzero().squeeze(1).int())
