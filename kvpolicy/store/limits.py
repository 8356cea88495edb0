"""The cap on a head's tokens, as a prompt call meets it."""

from __future__ import annotations

from ..errors import CapacityError
from .layer import LayerStore
from .state import CacheState


def check_tokens(state: CacheState, layer: LayerStore, counts: list[list[int]]) -> None:
    """Raises CapacityError if `counts` `[B][Hkv]` global tokens make a head exceed `max_tokens`.

    They are the layer's when the open prompt call has ended. With `at_cap="evict"` it may.
    """
    most, call = state.spec.max_tokens, state.call
    if most is None or state.spec.at_cap == "evict" or call is None:
        return
    rows = zip(map(max, counts), state.lengths, call.added, strict=True)
    for row, (held, length, added) in enumerate(rows):
        tokens = held + min(length + added, layer.window)
        if tokens > most:
            raise too_many(row, layer.index, tokens, most)


def too_many(row: int, layer: int, tokens: int, most: int) -> CapacityError:
    """What is wrong when a head of sequence `row` would hold `tokens`."""
    return CapacityError(
        f"max_tokens: a head of sequence {row} would hold {tokens} tokens in layer {layer}, the "
        f"cap is {most}; raise it, admit less, or choose at_cap='evict' with an eviction"
    )
