"""The values that ops exchange: pages, heads, rings, segments, and what is counted of them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

POSITION_BITS = 30
POSITION_MASK = (1 << POSITION_BITS) - 1
ADMITTED = 1  # bit 0 of a ring slot's flags: enters the global cache when it leaves the window
MARKED = 2  # bit 1: kept by a decision taken at write time for the prompt's end

Position = TypeVar("Position", int, Tensor)


class Pages(NamedTuple):
    """One device's pages, as every op takes them. Page 0 is the null page and holds nothing.

    `k` `[n, P, D]`, `v` `[n, P, Dv]`, `meta` `[n, P]` int32 (`position | mark << POSITION_BITS`)
    and `summary` `[n, S]` (or None) are the first extent: all pages on the reference backend.
    Kernels find page `i` through `slabs` `[m, 4]` int64: row `i // slab_pages` holds where that
    slab of k, v, meta and summary starts, relative to the first extent and in units of 16 elements;
    inside the slab the page is number `i % slab_pages`. `slab_pages` is a power of two.
    `free` int32 `[c]` is the stack of unused page ids, `top` int32 `[1]` its height (the next page
    taken is `free[top - 1]`), `refs` int32 `[c]` counts the heads that hold a page.
    """

    k: Tensor
    v: Tensor
    meta: Tensor
    summary: Tensor | None
    slabs: Tensor
    slab_pages: int
    free: Tensor
    top: Tensor
    refs: Tensor


class Heads(NamedTuple):
    """The global tokens of a layer's KV heads.

    `table` int32 `[B, Hkv, M]` names the pages of a head in the order of its tokens, `counts` int32
    `[B, Hkv]` how many tokens it stores. Entries past the last page may hold anything.
    """

    table: Tensor
    counts: Tensor


def ring_slot(position: Position, slots: int) -> Position:
    """The slot of a ring that holds what stands at `position`."""
    return position % slots


def ring_positions(lengths: Tensor, slots: int) -> Tensor:
    """The position that each slot of a ring holds after `lengths` `[..., 1]`: `[..., slots]`.

    Negative where a slot has not been written.
    """
    newest = lengths - 1
    return newest - (newest - torch.arange(slots, device=lengths.device)) % slots


def pages_of(tokens: Position, page_size: int) -> Position:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


class Arenas(NamedTuple):
    """Pages that sequences share out among their heads, where somebody else gives sequences memory.

    Page n of sequence b is `blocks[b, n // pages_per_block] * pages_per_block + n %
    pages_per_block`. `blocks` int32 `[B, n]`; `room`, `taken` int32 `[B]` count the pages that a
    sequence has and that its heads hold, `refused` int64 `[B]` admitted tokens that found none.
    Where heads gave pages back, those with n < `spared[b]` are `spare[b, n]` instead; both int32,
    `[B, most pages]` and `[B]`.
    """

    blocks: Tensor
    room: Tensor
    taken: Tensor
    refused: Tensor
    pages_per_block: int
    spare: Tensor | None = None
    spared: Tensor | None = None

    def page(self, sequence: Tensor | int, number: Tensor) -> Tensor:
        """Ids of pages by their number in their sequence; of those past its blocks, any."""
        each, last = self.pages_per_block, self.blocks.shape[1] - 1
        block = torch.div(number, each, rounding_mode="floor").long().clamp(max=last)
        found = self.blocks[sequence, block] * each + number % each
        if self.spare is None or self.spared is None:
            return found
        given = self.spare[sequence, number.long().clamp(max=self.spare.shape[1] - 1)]
        return torch.where(number < self.spared[sequence], given, found)


class Ring(NamedTuple):
    """A layer's most recent tokens: position p is in slot `p % slots`.

    `k` `[B, Hkv, S, D]`, `v` `[B, Hkv, S, Dv]`; `flags` uint8 `[B, Hkv, S]` of bits ADMITTED and
    MARKED. There are at least as many slots as the window is wide; rollback asks for more.
    """

    k: Tensor
    v: Tensor
    flags: Tensor

    @property
    def slots(self) -> int:
        """S, the number of slots."""
        return self.k.shape[2]

    def slot(self, position: Position) -> Position:
        """Where a position is held."""
        return ring_slot(position, self.slots)


class Pairs(NamedTuple):
    """Where a head's channels that RoPE turns together are: `first + f * step`, and `gap` later."""

    first: int
    step: int
    gap: int


def whole_lags(tokens: int, lag: int) -> int:
    """Partitions of `lag` that another whole one follows, in so many tokens."""
    return max(tokens // lag - 1, 0)


class Numbers(NamedTuple):
    """A number of each token of a layer, float32 (float64 where keys are).

    `stored` `[B, Hkv, C]`: that of a head's global token n at n; `recent` `[B, Hkv, S]`: those of
    the ring, slot by slot.
    """

    stored: Tensor
    recent: Tensor


class Segments(NamedTuple):
    """How packed queries and keys split over sequences in a prompt call; ints live on the host.

    Sequence b has queries `cu_q[b]:cu_q[b+1]` at positions `start[b], start[b]+1, ...` and keys
    `cu_k[b]:cu_k[b+1]` whose last one is at the last query's position. The tensors hold the same
    numbers on the device (int32).
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    start: tuple[int, ...]
    cu_q_dev: Tensor
    cu_k_dev: Tensor
    start_dev: Tensor

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, position and the sequence's new length of packed keys, `[Tk]` int64 each."""
        cu_q, cu_k = self.cu_q_dev.long(), self.cu_k_dev.long()
        rows = torch.repeat_interleave(
            torch.arange(len(self.start), device=cu_k.device),
            cu_k[1:] - cu_k[:-1],
            output_size=self.cu_k[-1],
        )
        ends = self.start_dev.long() + cu_q[1:] - cu_q[:-1]
        at = torch.arange(self.cu_k[-1], device=cu_k.device) - cu_k[1:][rows] + ends[rows]
        return rows, at, ends[rows]


class Bounds(NamedTuple):
    """Global tokens `[B][Hkv]` of a layer after a prompt call's writes, as the host knows them.

    `most` are bounds, so that the host need not wait for the device; `expected` are guesses, which
    may decide how something is computed and never what.
    """

    most: list[list[int]]
    expected: list[list[int]]


class TileReads(NamedTuple):
    """What tiles of queries of a prompt call read besides the window: blocks of keys, and columns.

    A tile holds the queries at positions `i * tile` to `(i + 1) * tile - 1`, a block the keys
    there; `tile` is a power of two. `blocks` bool `[Hs, N, M]` with Hs = Hkv or Hq: the tiles that
    hold queries of a sequence, in order, sequence after sequence as `tile_span` counts them, and
    whether they read the sequence's block m. `columns` int32 `[Hs, C, K]` (or None) are positions
    that are read one by one, rising, padded with positions beyond every sequence; tile n reads row
    `sets[n]` of them (int32 `[N]`).
    """

    tile: int
    blocks: Tensor
    columns: Tensor | None = None
    sets: Tensor | None = None


def tile_span(start: int, queries: int, tile: int) -> tuple[int, int]:
    """The first tile that holds one of `queries` from position `start` on, and the end of them."""
    return (start // tile, (start + queries - 1) // tile + 1) if queries else (0, 0)


def tile_spans(segments: Segments, tile: int) -> list[tuple[int, int]]:
    """`tile_span` of each sequence of a call."""
    pairs = zip(segments.start, segments.cu_q, segments.cu_q[1:], strict=False)
    return [tile_span(start, end - begin, tile) for start, begin, end in pairs]
