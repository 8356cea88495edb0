"""Ops that choose: pages and blocks to read, tokens to keep."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .values import Bounds, Heads, Pages, Segments


class Choosing(Protocol):
    """See `Ops`, which says what holds of all."""

    def quest_select(
        self, pages: Pages, heads: Heads, query: Tensor, budget: int, group: str, first: int,
        last: int,
    ) -> Tensor:  # fmt: skip
        """Quest's choice: pages by the upper bound of q.k inside them (mit-han-lab/Quest).

        `query` `[B, Hq, D]`; `pages.summary` `[n, 2 D]` holds each page's minimum and maximum key.
        The score of a page is the sum over channels of max(q * min, q * max), combined over a
        group's query heads by `group`: "max", "mean" or "each" (a choice per query head). See
        `top_pages` for the rest and the result `[B, Hkv or Hq, budget]`.
        """

    def top_pages(
        self, scores: Tensor, counts: Tensor, page_size: int, budget: int, first: int, last: int
    ) -> Tensor:
        """The `budget` best pages of each head, always including the first and last ones.

        `scores` `[B, Hs, M]` floats with Hs = Hkv or Hq, `counts` `[B, Hkv]` tokens. Of the budget,
        `last` trailing and then `first` leading pages are taken for certain; `last` = -1 is the
        trailing page only where it is partly filled. Ties go to the lower page. Returns `[B, Hs,
        budget]` int32 page numbers within the head in rising order, padded with -1.
        """

    def keys_at(
        self, key: Tensor, flags: Tensor, segments: Segments, pages: Pages, heads: Heads,
        tile: int, bounds: Bounds | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Admitted keys of a prompt call at their true positions, for choices by position.

        Arguments as in `prefill_attention`. Sequence after sequence, each with rows up to the end
        of its last tile (of `tile` positions; none without queries): keys `[Hkv, N, D]`, zeros
        where no token is, and whether there is one, bool `[Hkv, N]`. Recent tokens that were not
        admitted are no tokens here.
        """

    def antidiagonal_blocks(
        self, query: Tensor, keys: Tensor, present: Tensor, segments: Segments, scale: float,
        tile: int, stride: int, threshold: float, *, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """XAttention's choice of blocks, bool `[Hq, N, M]` (mit-han-lab/x-attention).

        `query` `[Hq, Tq, D]`, `keys` and `present` as `keys_at` gives them; `stride` divides
        `tile`. What is chosen says `kvpolicy.selection.XAttention.prompt`. A tile's choice depends
        on nothing but its own queries and the keys up to its end, to the last bit.
        """

    def keep_best(self, scores: Tensor, valid: Tensor, amount: Tensor) -> Tensor:
        """Marks the `amount` best valid tokens of each head, bool `[..., N]`; ties keep the later.

        `scores` (floats) and `valid` (bool) are `[..., N]`, `amount` `[...]` integers of at least
        0.
        """
