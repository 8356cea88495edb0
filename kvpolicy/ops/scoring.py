"""Ops that score tokens: stored ones for evictions, new ones for admissions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .values import Heads, Pages, Pairs, Ring


class Scoring(Protocol):
    """See `Ops`, which says what holds of all."""

    def window_scores(
        self, pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor,
        window: int, scale: float, *, observation: int, kernel: int, pooling: str, group: str,
        normalize: str, softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """SnapKV's scores `[B, Hkv, M * P]` of global tokens: the weights that the last
        `observation` queries gave them (FasterDecoding/SnapKV).

        The tokens' positions lie before the window. `queries` `[B, Hq, S', D]` holds the query of
        position p in slot `p % S'`, as the ring its keys; `lengths` `[B]` positions were seen.
        `scale` > 0 multiplies q.k. The other arguments are those of `kvpolicy.eviction.SnapKV`,
        whose `score` says the same on dense keys; a `group` of "each" takes the largest weight of a
        group query by query. A sink joins whichever keys are normalized over.
        Slots without a token score as one of weight 0. A head's scores depend on nothing but its
        own sequence, to the last bit.
        """

    def window_masses(
        self, pages: Pages, heads: Heads, ring: Ring, queries: Tensor, lengths: Tensor,
        window: int, scale: float, *, observation: int, squared: bool = False,
        softcap: float | None = None, sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Weights of the last queries, or their squares, summed over a group's heads and queries.

        Of the global tokens `[B, Hkv, M * P]`, and of those of the window in the order of their
        positions, `[B, Hkv, window]`. Arguments and promises as in `window_scores`, whose weights
        with `normalize="visible"` they are. 0 where no token is.
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

    def projected_norms(self, pages: Pages, heads: Heads, weight: Tensor) -> Tensor:
        """The mean over a group's query heads of |W v|_1 `[B, Hkv, M * P]` of the stored values v.

        `weight` `[Hq, Dv, hidden]` is the output projection; it may be any view. No product is
        held. 0 in slots without a token; in float32, or in the values' dtype where that is wider. A
        head's norms depend on nothing but its own sequence, to the last bit.
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
