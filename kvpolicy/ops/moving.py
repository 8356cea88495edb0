"""Ops that move tokens and read and copy pages."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .values import Heads, Pages


class Moving(Protocol):
    """See `Ops`, which says what holds of all."""

    def move_kept(
        self, pages: Pages, old: Tensor, new: Tensor, keep: Tensor, starts: Tensor, lengths: Tensor
    ) -> None:
        """Moves the kept tokens of each head to its front, in order: k, v and meta.

        Head u holds `lengths[u]` tokens (int32 `[U]`; 0: it is left alone) in pages `old[u]`, and
        token n stays if `keep[starts[u] + n]` (bool, flat; `starts` int64 `[U]`). They are written
        to pages `new[u]`; both tables are `[U, M]` int32. A page may be written by one head only
        and then either has the same place in both tables or is in no old one.
        """

    def read_tokens(
        self, pages: Pages, table: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Global tokens `source` `[B, Hkv, n]` int32 of each head: k `[B, Hkv, n, D]`, v, meta.

        `table` `[B, Hkv, M]` names the heads' pages. -1 reads as zeros.
        """

    def read_pages(self, pages: Pages, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contents of pages `ids` (any shape `[...]`): k `[..., P, D]`, v, meta `[..., P]`."""

    def read_meta(self, pages: Pages, ids: Tensor) -> Tensor:
        """Meta `[..., P]` of pages `ids` `[...]`, without their keys and values."""

    def copy_pages(self, pages: Pages, source: Tensor, target: Tensor) -> None:
        """Copies k, v, meta and summary of pages `source` `[N]` to pages `target` `[N]`.

        No page is both source and target, the null page apart.
        """

    def read_summary(self, pages: Pages, ids: Tensor) -> Tensor:
        """Summaries `[..., S]` of pages `ids` `[...]`."""

    def write_summary(self, pages: Pages, ids: Tensor, summary: Tensor) -> None:
        """Stores summaries `[N, S]` of pages `ids` `[N]`; writes to the null page are lost."""

    def write_minmax(self, pages: Pages, heads: Heads, before: Tensor, most: int) -> None:
        """Makes the summaries `[2 D]` of pages their smallest and largest key, channel by channel.

        Of the pages that hold a head's tokens from number `before` `[B, Hkv]` int32 on: at most
        `most` a head, none where no such token is.
        """
