"""Ops that write tokens: to pages, to the ring, and their numbers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .values import Arenas, Heads, Numbers, Pages, Ring, Segments


class Writing(Protocol):
    """See `Ops`, which says what holds of all."""

    def append(
        self, pages: Pages, table: Tensor, key: Tensor, value: Tensor, meta: Tensor, dest: Tensor,
        rows: Tensor,
    ) -> None:  # fmt: skip
        """Stores tokens in pages that the table already names.

        `key` `[Hkv, T, D]`, `value` `[Hkv, T, Dv]`, `meta` `[Hkv, T]` int32; token t of head h
        becomes global token `dest[h, t]` (`[Hkv, T]` int32, -1: not stored) of sequence `rows[t]`
        (`[T]` int32). `table` `[B, Hkv, M]` as in `Heads`.
        """

    def decode_write(
        self, pages: Pages, heads: Heads, ring: Ring, key: Tensor, value: Tensor,
        flags: Tensor | None, lengths: Tensor, active: Tensor, window: int, *,
        minmax: bool = False, bits: int = 0, query: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Writes one decoded token a sequence; the one that leaves the window goes to pages if
        admitted.

        `key` `[B, Hkv, D]`, `value` `[B, Hkv, Dv]` and flags go to the slot of position `lengths`
        in `ring`. The flags are `bits` and, if given, those of `flags` `[B, Hkv]` uint8. `lengths`
        `[B]` counts the tokens before this one. Rows that are not `active` `[B]` bool write
        nothing. A full last page makes its head take one from the free stack; where that is empty,
        the reference raises RuntimeError and the kernel writes to the null page: capacity is
        reserved before. `minmax` extends the page's summary `[2 D]` (minimum and maximum key).
        `query` `[B, Hq, D]`, if given, goes to the slot of position `lengths` in `queries`
        `[B, Hq, S', D]`.
        """

    def arena_write(
        self, pages: Pages, heads: Heads, ring: Ring, arenas: Arenas, key: Tensor, value: Tensor,
        flags: Tensor | None, rows: Tensor, lengths: Tensor, active: Tensor, window: int, *,
        minmax: bool = False, bits: int = 0,
    ) -> None:  # fmt: skip
        """`decode_write` for some sequences, whose pages are those of their arenas.

        Token n of `key` `[N, Hkv, D]`, `value` `[N, Hkv, Dv]` and `flags` `[N, Hkv]` is of sequence
        `rows[n]` (int32); no active one is named twice. Heads are given pages in their order while
        their arena has room. A token that is admitted and finds none is left out and counted.
        """

    def advance_ring(
        self, ring: Ring, key: Tensor, value: Tensor, flags: Tensor, segments: Segments, *,
        undo: bool,
    ) -> tuple[Ring, Ring | None]:  # fmt: skip
        """Recent tokens of a prompt call, which then go to the ring.

        `key` `[Hkv, T, D]`, `value` `[Hkv, T, Dv]`, `flags` `[Hkv, T]` uint8 are the new tokens of
        `segments`, at least one. Returns the recent ones, k `[Hkv, Tk, D]`, v and flags, packed as
        `segments` says: the new ones themselves where no sequence has earlier ones. The last new
        tokens of each sequence go to their slots in `ring`; with `undo` what it held before is
        returned as well.
        """

    def count_leaving(
        self, flags: Tensor, before: Tensor, segments: Segments, window: int, page_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How far heads grow: admitted tokens among the recent that are not in the window at the
        end of a prompt call.

        `flags` `[Hkv, Tk]` uint8 are those of the recent tokens (ring, then new ones) packed as
        `segments` says, `before` `[B, Hkv]` int32 the global tokens so far. Returns the counts
        afterwards and the pages that each head takes for that, both `[B, Hkv]` int32, and ranks: a
        tensor for `write_leaving` of the same backend.
        """

    def write_leaving(
        self, pages: Pages, heads: Heads, key: Tensor, value: Tensor, flags: Tensor,
        segments: Segments, window: int, after: Tensor, fresh: Tensor, ranks: Tensor,
    ) -> None:  # fmt: skip
        """Stores what `count_leaving` counted, with the same flags, counts, segments and window.

        `key` `[Hkv, Tk, D]`, `value` `[Hkv, Tk, Dv]` are the recent tokens. The table gets pages
        from the free stack, the topmost first, head after head and column after column; tokens are
        stored in the order of their positions. `heads.counts` becomes `after`. An empty free stack
        is met as in `decode_write`.
        """

    def write_number(
        self, numbers: Numbers, counts: Tensor, flags: Tensor, number: Tensor | None,
        lengths: Tensor, active: Tensor, window: int,
    ) -> None:  # fmt: skip
        """Numbers of one decoded token a sequence, before `decode_write` writes the tokens.

        The number of the token that leaves the window, if it is admitted, goes to place `counts`
        `[B, Hkv]` of its head, and `number` `[B, Hkv]` floats, or 0, to the slot of position
        `lengths` `[B]`. `flags` are the ring's, `active` as in `decode_write`.
        """
