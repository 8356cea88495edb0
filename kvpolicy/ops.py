"""The contract of the ops: their signatures, what they compute, and the values that they exchange.

`load` finds an implementation: `reference` (torch, which defines the result) or `kernels`
(Triton). `write_gate`, `prefill_attention` and `paged_decode` are also functions of this module,
for users who bring their own cache: on CUDA tensors they run the kernel where Triton is installed,
else the reference.

In shapes, B counts sequences, H heads (Hq of queries, Hkv of keys and values; a group of Hq / Hkv
query heads shares a KV head), T or N tokens, D channels of queries and keys, Dv those of values
and outputs, M pages of a table row, P tokens of a page. Positions and lengths count tokens; token n
of a head is the n-th one that it stores.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .backend import implementation, resolve

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


def check_asked(
    op: str, heads: int, softcap: float | None, sinks: Tensor | None, chunk: int | None = None
) -> None:
    """Raises ValueError for a softcap, sinks or a chunk that attention of `heads` cannot have."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap: wanted a positive number or None, got {softcap}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks: wanted [{heads}], a query head each, got {[*sinks.shape]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk: wanted a positive number or None, got {chunk}")


def check_minmax(op: str, pages: Pages) -> None:
    """Raises ValueError for pages without room for a smallest and a largest key."""
    width = 2 * pages.k.shape[2]
    if pages.summary is None or pages.summary.shape[1] != width:
        raise ValueError(f"{op}: minmax wants summaries [n, {width}] in pages.summary")


class Ops(Protocol):
    """The ops of one backend.

    Both backends raise ValueError or TypeError before anything is written. Kernels compute in
    float32, bfloat16 and float16 and refuse float64, which the reference takes; what they write in
    place wants a contiguous last dimension, and attention at most 512 channels. A product q.k in
    float16, whose range it may exceed, is scaled before it is rounded.

    What attention may be given besides:
    `softcap`: logits are softcap * tanh(scale * q.k / softcap) (Gemma 2).
    `sinks` `[Hq]` floats: a logit of each query head, neither scaled nor capped, that joins its
    softmax's denominator and has no value (gpt-oss).
    `chunk`: a query at position i sees none but the keys j with j // chunk == i // chunk (Llama 4).
    """

    backend: str

    # Writing tokens

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

    # Attention

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

    # Choosing

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

    # Scoring

    def window_scores(
        self, pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor,
        window: int, scale: float, *, observation: int, kernel: int, pooling: str, group: str,
        normalize: str, squared: bool = False, softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """SnapKV's scores `[B, Hkv, M * P]` of global tokens: the weights that the last
        `observation` queries gave them (FasterDecoding/SnapKV).

        The tokens' positions lie before the window. `queries` `[B, Hq, S', D]` holds the query of
        position p in slot `p % S'`, as the ring its keys; `lengths` `[B]` positions were seen.
        `scale` > 0 multiplies q.k. The other arguments are those of `kvpolicy.eviction.SnapKV`,
        whose `score` says the same on dense keys; a `group` of "each" takes the largest weight of a
        group query by query, and `squared` sums the squares of weights. A sink joins whichever keys
        are normalized over.
        Slots without a token score as one of weight 0. A head's scores depend on nothing but its
        own sequence, to the last bit.
        """

    def window_levels(
        self, pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor,
        window: int, scale: float, *, observation: int, softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-sum-exps `[B, Hq, observation]` of the last queries' logits of all keys they see.

        Arguments as in `window_scores`, whose weights with `normalize="visible"` are
        exp(logit - level). +inf for a query that sees no key.
        """

    def key_dots(
        self, pages: Pages, heads: Heads, vectors: Tensor, sizes: Tensor | None = None,
        pairs: Pairs | None = None, *, unit: bool = False,
    ) -> Tensor:  # fmt: skip
        """Dots m.k `[B, Hq, M * P]` of the keys k that a group's KV head stores.

        `vectors` m `[B, Hq, D]` are floats of 32 bits (of 64 on the reference, as are the dots
        then). With `sizes` s `[B, Hq, F]`, sum_f s_f |k_f| is added, k_f being pair f of the
        channels as `pairs` says. With `unit` keys are divided by their norm, 1e-8 at least. Slots
        without a token are 0. A head's dots depend on nothing but its own sequence, to the last
        bit.
        """

    def key_directions(self, pages: Pages, heads: Heads) -> Tensor:
        """The sum of k / |k| over the keys that heads store, `[B, Hkv, D]` float64.

        A head's sum depends on nothing but its own sequence, to the last bit.
        """

    def key_norms(self, pages: Pages, heads: Heads) -> Tensor:
        """Norms |k| `[B, Hkv, M * P]` of the keys that heads store; else as `value_norms`."""

    def lag_spreads(
        self, pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, window: int, *, sinks: int,
        lag: int, values: bool = False,
    ) -> Tensor:  # fmt: skip
        """LagKV's spreads `[B, Hkv, parts, lag]` of keys, or of `values`
        (AI-Lab-China-Merchants-Bank/LagKV).

        A head's stored tokens and the recent ones of the window form partitions of `lag` after the
        first `sinks`. A token's spread is the standard deviation over channels of
        (x - min) / (max - min), with the next partition's smallest and largest value of each
        channel (their difference counts as 1 where it is 0). There are `whole_lags(M * P + window -
        sinks, lag)` parts, zeros where a head has no whole partition after one. A head's spreads
        depend on nothing but its own sequence, to the last bit.
        """

    def expected_logits(
        self, pages: Pages, heads: Heads, linear: Tensor, square: Tensor | None
    ) -> Tensor:
        """Logits m.k + k'Ck `[B, Hq, M * P]` of the keys k that a group's KV head stores.

        `linear` m `[B, Hq, D]` and the symmetric `square` C `[B, Hq, D, D]`, if given, are floats
        of 32 bits (of 64 on the reference, as are the logits then). Slots without a token are 0. A
        head's logits depend on nothing but its own sequence, to the last bit.
        """

    def value_norms(self, pages: Pages, heads: Heads) -> Tensor:
        """Norms |v| `[B, Hkv, M * P]` of the values that heads store, 0 in slots without a token.

        In float32, or in the values' dtype where that is wider.
        """

    def last_similar(self, keys: Tensor, lengths: Tensor, threshold: float) -> Tensor:
        """For each of a head's keys the last other one at an angle of cosine > `threshold`.

        `keys` `[U, N, D]` have a norm of 1, and of head u the first `lengths[u]` (`[U]`) count.
        Returns their places int32 `[U, N]`, -1 where there is none. No product of all keys with
        all others is held.
        """

    def redundancy_scores(
        self, pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor,
        window: int, scale: float, *, observation: int, kernel: int, mix: float, threshold: float,
        group: str, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """R-KV's scores `[B, Hkv, M * P]` of the global tokens (Zefan-Cai/R-KV).

        `queries` as in `window_scores`; what is scored says `kvpolicy.eviction.RKV`. A head's keys
        are those that it stores and then, without a gap, the recent ones of the window; for
        redundancies they are divided by their norms and rounded to their dtype. Slots without a
        token are 0. In float32, or in the keys' dtype where that is wider. No product of all keys
        with all others is held, and a head's scores depend on nothing but its own sequence, to the
        last bit.
        """

    def write_gate(
        self, key_pre: Tensor, key: Tensor, norm_pre: Tensor, norm_post: Tensor, w1: Tensor,
        b1: Tensor, w2: Tensor, b2: Tensor, limit: float | None = None, inclusive: bool = False,
        silu: bool = False,
    ) -> Tensor:  # fmt: skip
        """Gate scores of tokens, in [0, 1] and in the keys' dtype, or decisions about them.

        `key_pre`, `key` `[Hkv, T, D]` (before and after RoPE), `norm_pre`, `norm_post` `[D]`,
        `w1` `[Hkv, m, 2D]`, `b1` `[Hkv, m]`, `w2` `[Hkv, m]`, `b2` `[Hkv]`; returns `[Hkv, T]`.
        g = sigmoid(w2 . gelu(w1 [n(key_pre); n(key)] + b1) + b2) with RMS norms n and the exact
        GELU, or SiLU with `silu` (EMCLab-Sinica/WG-KV, src/modeling_layers.py). With a `limit`, a
        number of the keys' dtype, the result is bool: g > limit (`inclusive`: g >= limit), g
        rounded to the keys' dtype first. A token's score depends on nothing but the token, to the
        last bit.
        """

    # Moving tokens and pages

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


def load(name: str) -> Ops:
    """The ops of a resolved backend, "reference" or "triton"."""
    return cast(Ops, implementation(name))


def write_gate(
    key_pre: Tensor, key: Tensor, norm_pre: Tensor, norm_post: Tensor, w1: Tensor, b1: Tensor,
    w2: Tensor, b2: Tensor, limit: float | None = None, inclusive: bool = False,
    silu: bool = False,
) -> Tensor:  # fmt: skip
    """Gate scores or decisions `[Hkv, T]`; see `Ops.write_gate`."""
    weights = (norm_pre, norm_post, w1, b1, w2, b2)
    return _ops(key).write_gate(key_pre, key, *weights, limit, inclusive, silu)


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, flags: Tensor, segments: Segments, pages: Pages,
    heads: Heads, window: int, scale: float, bounds: Bounds | None = None, *,
    softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Admission-sparse attention `[Hq, Tq, Dv]`; see `Ops.prefill_attention`."""
    recent = (key, value, flags)
    return _ops(query).prefill_attention(
        query, *recent, segments, pages, heads, window, scale, bounds,
        softcap=softcap, sinks=sinks, chunk=chunk,
    )  # fmt: skip


def paged_decode(
    query: Tensor, pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, active: Tensor,
    window: int, scale: float, selected: Tensor | None = None, *,
    softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Ragged paged attention `[B, Hq, Dv]`; see `Ops.paged_decode`."""
    return _ops(query).paged_decode(
        query, pages, heads, ring, lengths, active, window, scale, selected,
        softcap=softcap, sinks=sinks, chunk=chunk, rows=rows,
    )  # fmt: skip


def _ops(probe: Tensor) -> Ops:
    return load(resolve("auto", probe.device))
