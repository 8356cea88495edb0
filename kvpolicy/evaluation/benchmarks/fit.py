"""Contexts as long as a model shall read, counted in its own tokens."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from ..tasks.prompts import encode
from .item import Item


def tokens_of(tokenizer: PreTrainedTokenizerBase, item: Item) -> int:
    """Tokens of an item with its reply, without what a chat template adds."""
    text = f"{item.context}\n\n{item.question}{item.lead}"
    return len(encode(tokenizer, text)) + item.new_tokens


def longest(
    tokenizer: PreTrainedTokenizerBase, make: Callable[[int], Item], length: int, least: int = 1
) -> int:
    """The most units that `make(units)` may have so that its item takes at most `length` tokens.

    Raises:
        ValueError: not even `least` units fit.
    """

    def fits(units: int) -> bool:
        return tokens_of(tokenizer, make(units)) <= length

    if not fits(least):
        need = tokens_of(tokenizer, make(least))
        raise ValueError(
            f"length: wanted at least {need} tokens for {make(least).task}, got {length}"
        )
    low, high = least, 2 * least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
