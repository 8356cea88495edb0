"""Ops that attend over pages and ring, and one that sums up what queries attended to."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .values import Bounds, Heads, Numbers, Pages, Ring, Segments, TileReads


class Attention(Protocol):
    """See `Ops`, which says what holds of all."""

    def dense_prefill(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, pages: Pages,
        table: Tensor, scale: float, *, softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Causal attention of a prompt call where every token is stored. Returns `[Hq, Tq, Dv]`.

        Arguments as in `prefill_attention`; `table` `[B, Hkv, M]` as in `Heads`. The global token
        at index n has position n; those before a sequence's first recent key come from its pages.
        """

    def prefill_attention(
        self, query: Tensor, key: Tensor, value: Tensor, flags: Tensor, segments: Segments,
        pages: Pages, heads: Heads, window: int, scale: float, bounds: Bounds | None = None, *,
        softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Exact attention of a prompt call over {j <= i : i - j < window or admitted[j]}.

        `query` `[Hq, Tq, D]`; `key` `[Hkv, Tk, D]`, `value` `[Hkv, Tk, Dv]` and `flags` `[Hkv, Tk]`
        uint8 are the recent tokens (ring, then new ones) packed as `segments` says. `heads` holds
        the global tokens in position order, including those that leave the window in this call. A
        tile of queries starting at position s reads global tokens before s - window + 1 without a
        mask, and recent ones from there on with it: the vertical-slash pattern of WG-KV. `scale`
        multiplies q.k. `bounds` is what the host knows of the counts, which saves waiting for the
        device. Returns `[Hq, Tq, Dv]`.
        """

    def selected_prefill(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, pages: Pages,
        heads: Heads, window: int, scale: float, reads: TileReads, bounds: Bounds | None = None,
        *, softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a prompt call over {j <= i : i - j < window or stored[j] and chosen}.

        Arguments as in `prefill_attention`. Of the global tokens a query reads those that have left
        its window and lie in a block or column that `reads` gives its tile. Returns `[Hq, Tq, Dv]`.
        """

    def paged_decode(
        self, query: Tensor, pages: Pages, heads: Heads, ring: Ring, lengths: Tensor,
        active: Tensor, window: int, scale: float, selected: Tensor | None = None, *,
        softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of one decoded token a sequence over the local window and the global tokens,
        all or the selected pages of them.

        `query` `[B, Hq, D]` stands at position `lengths` `[B]`, whose key is in the ring already.
        `selected` int32 `[B, Hs, K]` names pages by their number within the head (-1: none) for
        Hs = Hkv or Hq heads. `scale` multiplies q.k. Returns `[B, Hq, Dv]`, zeros for rows that are
        not `active` `[B]` bool. With `rows` int32 `[N]` query n of `[N, Hq, D]` and its `selected`
        are of sequence `rows[n]`, and so is the result.
        """

    def attention_mass(
        self, numbers: Numbers, pages: Pages, heads: Heads, ring: Ring, query: Tensor,
        lengths: Tensor, first: Tensor, last: Tensor, window: int, scale: float, *, most: int,
        accumulates: str, group: str, shifts: tuple[int, int] = (0, 0),
        among: tuple[int, int, int, int] | None = None,
        softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
    ) -> None:  # fmt: skip
        """Adds to the numbers of tokens the attention weights that queries give them, in place.

        Queries at positions `first[b]` to `last[b] - 1` (`[B]` int64; at most `most` of them, none
        before position 0) of sequences of `lengths` `[B]` tokens attend to the global tokens up to
        their own position and to the recent ones among their last `window`. The weights of a
        group's query heads are combined by `group`: "mean", "max" or "sum"; `accumulates` is "sum"
        or "max". `query` `[B, Hq, S', D]` holds the query of position p in slot
        `(p - shifts[0]) % S'`, and `ring` its tokens in slots `(p - shifts[1]) % S`; there a token
        that left the window and was admitted is a global one. With `among` = (a, b, c, d) queries
        see no tokens but those before position a, from b to before c and from d on, and only those
        from b to before c take weights.
        """
