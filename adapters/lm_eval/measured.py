"""What the caches of an evaluation took, for its results."""

from __future__ import annotations

from typing import Any

import attrs

from ...spec import CacheSpec
from ...store import Report
from ..hf import Held


@attrs.define
class Measured:
    """Sums over the sequences of one kind of request.

    `tokens` seen, `kept` of them by a KV head on average, `bytes` of all that stores them, pages
    reserved for more left out, `full` those of full attention's keys and values.
    """

    sequences: int = 0
    tokens: int = 0
    kept: float = 0.0
    bytes: int = 0
    full: int = 0

    def add(self, report: Report, spec: CacheSpec, sequences: int) -> None:
        """Counts a cache of so many sequences."""
        heads = [tokens for layer in report.stored for tokens in layer]
        itemsize = spec.dtype.itemsize
        self.sequences += sequences
        self.tokens += report.tokens
        self.kept += sequences * sum(heads) / len(heads)
        self.bytes += report.total - report.reserved
        self.full += report.tokens * spec.layers * spec.kv_heads * 2 * spec.head_dim * itemsize

    def add_held(self, held: Held | None, spec: CacheSpec) -> None:
        """Counts a sequence among others, whose window's memory is theirs together."""
        if held is None:
            return
        self.sequences += 1
        self.tokens += held.tokens
        self.kept += held.kept * held.tokens
        self.bytes += held.bytes
        self.full += (
            held.tokens * spec.layers * spec.kv_heads * 2 * spec.head_dim * (spec.dtype.itemsize)
        )

    def record(self) -> dict[str, Any]:
        """Means over sequences, and the fraction kept."""
        n = max(self.sequences, 1)
        return {
            "sequences": self.sequences,
            "tokens": self.tokens / n,
            "kept_fraction": self.kept / max(self.tokens, 1),
            "bytes": self.bytes / n,
            "full_attention_bytes": self.full / n,
        }
