"""The pages that a request is expected to take, from what prompts were measured to keep."""

from __future__ import annotations

import math
from functools import lru_cache

from ....ops import pages_of
from ....pipeline import CachePipeline
from ....store import CacheState
from ..memory import global_tokens
from .scheduler import Entry, Pages

GRAIN = 64  # tokens: prompts are taken for longer than they are, so that few are worked out
STEPS = 32  # of admitted fractions

Counts = list[list[int]]  # [layer][head]


class Expected:
    """Expects pages by pool.

    What follows from positions, budgets and caps is known exactly. A learned admission is taken to
    admit what it admitted of the request's own prompt so far; before that what it did of earlier
    prompts, and everything before the first.
    """

    def __init__(self, pipeline: CachePipeline, state: CacheState) -> None:
        self.pipeline, self.spec = pipeline, state.spec
        self.window = pipeline.window
        # Layers by pool: their place in the model, their heads.
        self.pools = [
            [(x.index, pool.page_size) for x in state.managed if x.pool is pool]
            for pool in state.devices.pools
        ]
        evictions = [pipeline.eviction.at(n) for n in self.spec.managed]
        self.learned = any(
            not admission.by_position
            for n in self.spec.managed
            for admission in (pipeline.admission.at(n), pipeline.eviction.at(n).admission)
            if admission is not None
        )
        self.decoding = any(x.when == "decode" and not x.neutral for x in evictions)
        self.ending = any(x.when == "prompt_end" and not x.neutral for x in evictions)
        self.passed = self.stored = 0  # tokens of a head past its window, and those stored
        self.counts = lru_cache(1024)(self._counts)

    def least(self, entry: Entry) -> Pages:
        """Pages that the prompt of `entry` needs whatever a learned admission admits."""
        return self._pages(global_tokens(self.pipeline, self.spec, entry.prompt, 0.0)[0])

    def need(self, entry: Entry) -> Pages:
        """Pages that `entry` is expected to take beside those that it holds."""
        most = self._most(entry, self._fraction(entry))
        return tuple(max(n - held, 0) for n, held in zip(most, entry.load.pages, strict=True))

    def read(self, entry: Entry, stored: int) -> None:
        """Says that all heads of `entry` together store `stored` tokens of what it read."""
        load = entry.load
        before = load.passed, load.stored
        self.began(entry, stored)
        self.passed += load.passed - before[0]
        self.stored += load.stored - before[1]

    def began(self, entry: Entry, stored: int) -> None:
        """The same of what `entry` took over from another."""
        past = max(entry.read - self.window, 0) * self._heads()
        entry.load.passed, entry.load.stored = past, stored

    def _heads(self) -> int:
        return sum(self.spec.at(n).kv_heads for n in self.spec.managed)

    def _fraction(self, entry: Entry) -> float:
        """What a learned admission admits; few values, rounded up."""
        if not self.learned:
            return 0.0
        load = entry.load
        passed, stored = (
            (load.passed, load.stored)
            if load.passed >= self.window * self._heads()
            else (self.passed, self.stored)
        )
        return min(math.ceil(stored / passed * STEPS), STEPS) / STEPS if passed else 1.0

    def _most(self, entry: Entry, fraction: float) -> Pages:
        """Pages that `entry` holds at its largest, or from now on."""
        both = entry.prompt + entry.most
        written, left = self.counts(entry.prompt, fraction)
        grown, bound = self.counts(both, fraction)
        if not (self.ending or self.decoding):
            return self._pages(grown)
        if self.decoding:
            later = self._pages(bound, self.spec.interval)
        else:  # what is decoded stays
            later = self._pages(
                [
                    [n + b - a for n, a, b in zip(*heads, strict=True)]
                    for heads in zip(left, written, grown, strict=True)
                ]
            )
        if entry.left:
            return tuple(map(max, self._pages(written), later))
        return later

    def _counts(self, tokens: int, fraction: float) -> tuple[Counts, Counts]:
        """Global tokens `[L][Hkv]` of a prompt of `tokens`: written, and left when it has ended."""
        return global_tokens(self.pipeline, self.spec, -(-tokens // GRAIN) * GRAIN, fraction)

    def _pages(self, counts: Counts, more: int = 0) -> Pages:
        """Pages by pool of heads with `counts` global tokens and `more`."""
        most = self.spec.max_tokens or 1 << 60  # of a head, its window included
        return tuple(
            sum(pages_of(min(n + more, most), size) for layer, size in own for n in counts[layer])
            for own in self.pools
        )
