"""How many blocks a request needs: the one formula that scheduler and workers share.

A request's blocks are an arena: pages of one KV head each, whichever layer and head takes them
next. Recent tokens lie in rings outside it, so that pages hold only what left the window.
"""

from __future__ import annotations

import math

import attrs

from ...admission import Admission, AdmitAll, DuoAttention, LocalAttention
from ...budget import Budget
from ...ops import pages_of

PAGE = 16  # tokens of a page


@attrs.frozen
class Alike:
    """KV heads that store alike: the first `sinks` tokens (None: all), or a `share` of them.

    A share below 1 is an expectation: what a gate admits is known only on the device.
    """

    heads: int
    sinks: int | None = None
    share: float = 1.0

    def pages(self, tokens: int) -> int:
        """Pages that these heads need for what they store of `tokens` that left the window."""
        if self.sinks is not None:
            return self.heads * pages_of(min(tokens, self.sinks), PAGE)
        all_of_them = pages_of(tokens, PAGE)
        if self.share == 1.0:
            return self.heads * all_of_them
        # A head's last page may hold one token.
        return self.heads * min(all_of_them, math.ceil(self.share * tokens / PAGE) + 1)

    def pages_after(self, dropped: int, tokens: int, kept: int) -> int:
        """Pages where at most `kept` of the first `dropped` tokens stayed: none are given back
        since."""
        last = 0 if self.share == 1.0 else 1
        held = min(self._stored(dropped), kept) + self._stored(tokens) - self._stored(dropped)
        return self.heads * (pages_of(held, PAGE) + last)

    def _stored(self, tokens: int) -> int:
        """Tokens of one head, of so many that left the window."""
        if self.sinks is not None:
            return min(tokens, self.sinks)
        return math.ceil(self.share * tokens)


@attrs.frozen
class Plan:
    """Blocks of a request by its length, equal on every rank.

    `block` is the scheduler's block size in tokens, a multiple of 16; `heads` counts the KV heads
    of all layers on one rank. Each rank's heads are in `ranks`: the one that needs most decides.
    At a prompt's end a head keeps what `budget` allows, where there is one.
    """

    block: int
    window: int
    heads: int
    ranks: tuple[tuple[Alike, ...], ...]
    budget: Budget | None = None

    @property
    def pages_per_block(self) -> int:
        """Pages of one head in a block."""
        return self.block // PAGE * self.heads

    def kept(self, prompt: int) -> int:
        """Tokens in pages that a head keeps at most at the end of a prompt."""
        left = max(prompt - self.window, 0)
        return left if self.budget is None else self.budget.allowed(prompt, self.window, 0, 1)

    def pages(self, length: int, prompt: int | None = None) -> int:
        """Pages of a request of `length` tokens, on the rank that needs most.

        `prompt` of them are its prompt; without it all are. It never has fewer pages than at the
        prompt's end: what was dropped there leaves room for what is generated.
        """
        left = max(length - self.window, 0)
        if prompt is None or self.budget is None or length <= prompt:
            return max(sum(alike.pages(left) for alike in rank) for rank in self.ranks)
        before, kept = max(prompt - self.window, 0), self.kept(prompt)
        after = (sum(x.pages_after(before, left, kept) for x in rank) for rank in self.ranks)
        return max(self.pages(prompt), *after)

    def blocks(self, length: int, prompt: int | None = None) -> int:
        """Blocks of a request of `length` tokens. The first names its row, so there is one."""
        return max(-(-self.pages(length, prompt) // self.pages_per_block), 1)

    @property
    def exact(self) -> bool:
        """Whether no request can admit more than its blocks hold."""
        return all(alike.share == 1.0 for rank in self.ranks for alike in rank)


def plan_of(
    admission: Admission, window: int, layers: int, kv_heads: int, ranks: int, block: int,
    admitted: float | None, budget: Budget | None = None,
) -> Plan:  # fmt: skip
    """The plan for a model of `layers` layers and `kv_heads` KV heads over `ranks` ranks.

    `admitted` is the part of the tokens that a gate is expected to admit, over all heads, with its
    margin; DuoAttention, LocalAttention and AdmitAll are exact and take none.

    Raises:
        ValueError: `admitted` is missing, is no part, or is given where the number is exact; or
            sizes do not divide.
    """
    if block % PAGE:
        raise ValueError(f"block_size: wanted a multiple of {PAGE}, got {block}")
    if kv_heads % ranks:
        raise ValueError(
            f"tensor_parallel_size: wanted a divisor of the {kv_heads} KV heads, got {ranks}"
        )
    name, own = type(admission).__name__, kv_heads // ranks
    exact = isinstance(admission, AdmitAll | LocalAttention | DuoAttention)
    if exact and admitted is not None:
        raise ValueError(f"admitted: {name} has an exact number of tokens, got {admitted}")
    if not exact and admitted is None:
        raise ValueError(
            f"admitted: {name} decides on the device; wanted the part of the tokens that it admits "
            "and a margin, such as 0.3"
        )
    parts: tuple[tuple[Alike, ...], ...]
    if isinstance(admission, AdmitAll):
        parts = ((Alike(layers * own),),) * ranks
    elif isinstance(admission, LocalAttention):
        parts = ((Alike(layers * own, sinks=admission.sinks),),) * ranks
    elif isinstance(admission, DuoAttention):
        parts = tuple(_duo(admission, range(rank * own, (rank + 1) * own)) for rank in range(ranks))
    else:
        assert admitted is not None
        if isinstance(admitted, bool) or not isinstance(admitted, int | float):
            raise TypeError(f"admitted: wanted a number in (0, 1], got {admitted!r}")
        if not 0 < admitted <= 1:
            raise ValueError(f"admitted: wanted a number in (0, 1], got {admitted}")
        parts = ((Alike(layers * own, share=float(admitted)),),) * ranks
    return Plan(block, window, layers * own, parts, budget)


def _duo(admission: DuoAttention, heads: range) -> tuple[Alike, ...]:
    """Full and streaming heads of one rank."""
    full = sum(row[head] for row in admission.full_heads for head in heads)
    rest = len(admission.full_heads) * len(heads) - full
    return Alike(full), Alike(rest, sinks=admission.sinks)


def check_rows(rows: int, row_bytes: int, row_memory: float, space: float) -> None:
    """Raises ValueError where rows take too much besides `space` bytes of blocks, and says how many
    do not."""
    if (rows + 1) * row_bytes > row_memory * space:  # one more is a place for padding
        fits = int(row_memory * space // row_bytes) - 1
        raise ValueError(
            f"kvpolicy: max_num_seqs: {rows} rows of {row_bytes / 2**20:.2f} MiB take more than "
            f"{row_memory} of the {space / 2**20:.0f} MiB of blocks; wanted at most "
            f"{max(fits, 0)} (--max-num-seqs), a shorter max_model_len or a larger 'row_memory'"
        )
