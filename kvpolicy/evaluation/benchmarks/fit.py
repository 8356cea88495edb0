"""Contexts as long as a model shall read, counted in its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from .chat import Chat
from .item import Item


def tokens_of(chat: Chat, items: Sequence[Item]) -> int:
    """Tokens of a context in the model's chat template, with the longest question and reply."""
    (reading,) = chat.readings(items)
    asked = zip(reading.questions, reading.new_tokens, strict=True)
    return len(reading.context) + max(len(question) + new for question, new in asked)


def longest(
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[int], list[Item]],
    length: int,
    least: int = 1,
    most: int = 1 << 24,
) -> int:
    """The most units that `make(units)` may have so that its items take at most `length` tokens.

    No more than `most`.

    Raises:
        ValueError: not even `least` units fit.
    """
    chat = Chat(tokenizer)

    def tokens(units: int) -> int:
        return tokens_of(chat, make(units))

    low, took = least, tokens(least)
    if took > length:
        task = make(least)[0].task
        raise ValueError(f"length: wanted at least {took} tokens for {task}, got {length}")
    high = min(2 * least + 8, most)
    while (over := tokens(high)) <= length:
        if high == most:
            return most
        # Units are about alike, so that the next guess is a little beyond the line through both.
        slope = max((over - took) / (high - low), 0.05)
        low, took, high = high, over, min(high + int((length - over) / slope * 1.05) + 1, most)
    while high - low > 1:
        guess = low + round((length - took) / max(over - took, 1) * (high - low))
        middle = min(max(guess, low + 1), high - 1)
        found = tokens(middle)
        if found <= length:
            low, took = middle, found
        else:
            high, over = middle, found
    return low
