"""Many questions about what a cache holds, in slots: each goes on from a fork of a sequence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ...._arguments import rows_below, wrong
from ...._fields import check_int
from ....errors import PhaseError, UnsupportedError
from ..attached import Attached
from ..cache import KVPolicyCache
from ..phases import one_by_one
from .engine import Engine
from .load import Load
from .options import Reader
from .requests import Finished, Request
from .room import Room, Source
from .served import check_served, expected_new

TOKENS = 8192  # of a question in one call


class Questions(Engine):
    """Serves requests whose prompts are questions, each to one of the sequences of a cache."""

    def __init__(self, *given: Any, cache: KVPolicyCache, rows: Sequence[int]) -> None:
        super().__init__(*given)
        assert cache.state is not None
        self.rows, self.row = iter(rows), 0
        self.lengths, self.pages = cache.state.lengths, self.room.shared(cache.state)
        self.sources = [
            Source(cache.state, row, cache.states.select([row]) if cache.states else [])
            for row in range(cache.state.batch)
        ]

    def _add(self, request: Request) -> bool:
        self.row = next(self.rows)
        return super()._add(request)

    def _load(self, request: Request) -> Load:
        load = super()._load(request)
        load.source, load.pages = self.sources[self.row], self.pages[self.row]
        load.begun = load.unlisted = self.lengths[self.row]
        return load


def ask_many(
    attachment: Attached,
    cache: KVPolicyCache,
    requests: Collection[Request],
    rows: Sequence[int] | None,
    slots: int,
    tokenizer: Any,
) -> Iterator[Finished]:
    """See `Attachment.ask_many`; everything is checked before this returns."""
    check_int("slots", slots, 1)
    if isinstance(requests, str | Request) or not isinstance(requests, Collection):
        raise TypeError(wrong("requests", "a list of Request objects", requests))
    check_served(attachment)
    if one_by_one(attachment) or attachment.served.probe.first:
        raise UnsupportedError(
            "ask_many: evictions act between a question's tokens, or the model reads or counts "
            "them in a way of its own; ask by attached.ask"
        )
    cache = attachment.cache_for(cache, "cache")
    if cache.state is None or cache.phase != "decode":
        raise PhaseError(
            "ask_many: the cache's prompt has not ended; read the context by "
            "attached.read(context), or call cache.end_prompt()"
        )
    if rows is None:
        if cache.state.batch > 1:
            raise TypeError(
                f"rows: wanted which of the cache's {cache.state.batch} sequences each request "
                "asks, got None"
            )
        rows = [0] * len(requests)
    rows = rows_below("rows", rows, cache.state.batch)
    if len(rows) != len(requests):
        raise ValueError(f"rows: wanted one for each of {len(requests)} requests, got {len(rows)}")
    reader = Reader(attachment, tokenizer)
    read = [reader.options(one) for one in requests]
    before = [len(one.ids) + cache.state.lengths[row] for one, row in zip(read, rows, strict=True)]
    longest = max(
        (n + expected_new(attachment, n, x.most) for n, x in zip(before, read, strict=True)),
        default=1,
    )
    return _run(attachment, cache.fork(), requests, rows, slots, reader, longest)


def _run(
    attachment: Attached,
    cache: KVPolicyCache,
    requests: Collection[Request],
    rows: Sequence[int],
    slots: int,
    reader: Reader,
    longest: int,
) -> Iterator[Finished]:
    assert cache.state is not None
    room = Room(attachment, slots, dict(attachment.sizes), cache)
    room.state.widen(longest)
    engine = Questions(attachment, requests, room, TOKENS, (), reader, cache=cache, rows=rows)
    try:
        yield from engine.run()
    finally:
        engine.close()
        cache.state = None
