"""Token ids of a document in the model's chat template and of questions about it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?][\"')]*(?=\s)|\n\n|$)", re.DOTALL)
_CHARS_PER_TOKEN = 12  # more than any text and tokenizer here reach


class Question(NamedTuple):
    """A question as it follows the context, with the start of the reply, and the answer."""

    question_ids: Ids
    answer_ids: Ids


@attrs.frozen(kw_only=True)
class Example:
    """One context and questions about it, each asked by itself.

    `context_ids + question_ids + answer_ids` is one conversation in the model's chat template.
    """

    context_ids: Ids
    questions: tuple[Question, ...]


@attrs.frozen
class Frame:
    """What the chat template puts around a user's message."""

    tokenizer: PreTrainedTokenizerBase
    before: str = attrs.field(init=False)
    after: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError("tokenizer: it has no chat template")
        mark = "MESSAGE"
        chat = [{"role": "user", "content": mark}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before, _, after = str(text).rpartition(mark)
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)

    def encode(self, text: str) -> Ids:
        """Ids of `text` alone; the template's own text brings the special tokens."""
        return encode(self.tokenizer, text)

    def opening(self, instruction: str) -> Ids:
        """Ids of everything before the document."""
        return self.encode(f"{self.before}{instruction}\n\n")

    def ask(self, question: str, *, lead: str, answer: str) -> Question:
        """A question whose reply starts with `lead` and goes on with `answer`."""
        text = f"\n\n{question}{self.after}{lead}"
        asked, replied = self.encode(text), self.encode(text + answer)
        same = next(
            (i for i, (a, b) in enumerate(zip(asked, replied, strict=False)) if a != b), len(asked)
        )
        return Question(replied[:same], replied[same:])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Ids of `text` without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def sentences(
    encode: Callable[[str], Ids], text: str, tokens: int, rng: random.Random
) -> list[Ids]:
    """Sentences from a random place in `text`, cut to `tokens` ids in all.

    Raises:
        ValueError: the text is too short.
    """
    latest = max(len(text) - _CHARS_PER_TOKEN * tokens, len(text) // 4)
    start = text.find("\n\n", rng.randrange(latest)) + 2 if latest else 0
    found: list[Ids] = []
    for match in _SENTENCE.finditer(text[start : start + _CHARS_PER_TOKEN * tokens].lstrip()):
        ids = encode(match.group())[:tokens]
        found.append(ids)
        tokens -= len(ids)
        if tokens == 0:
            return found
    raise ValueError(
        f"text: {tokens} tokens fewer than contexts of this length need; give more text, or a "
        "smaller length"
    )


def scatter(sentences: Sequence[Ids], inserts: Sequence[Ids], tail: int, rng: random.Random) -> Ids:
    """Put `inserts` between sentences at random places more than `tail` tokens from the end.

    Raises:
        ValueError: there are too few such places.
    """
    after = sum(map(len, sentences))
    places = []
    for i, sentence in enumerate(sentences):
        if i and after > tail:
            places.append(i)
        after -= len(sentence)
    if len(places) < len(inserts):
        raise ValueError(f"length: {len(places)} places for {len(inserts)} insertions; want more")
    chosen = dict(zip(rng.sample(places, len(inserts)), inserts, strict=True))
    return tuple(
        token for i, sentence in enumerate(sentences) for token in (*chosen.get(i, ()), *sentence)
    )


def token_ids(
    text: str | Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tensor:
    """Token ids `[N]` of ids or of a text.

    Raises:
        ValueError: a text came without a tokenizer, or what came is not a row of ids.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("tokenizer: wanted one for a text, got None")
        text = tokenizer(text, verbose=False).input_ids
    ids = torch.as_tensor(text)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise ValueError(f"text: wanted token ids [N], got {ids.dtype} {list(ids.shape)}")
    return ids
