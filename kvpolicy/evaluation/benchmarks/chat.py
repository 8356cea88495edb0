"""An item as token ids: its context, and its question with the start of the reply."""

from __future__ import annotations

from typing import NamedTuple

import attrs
from transformers import PreTrainedTokenizerBase

from ..tasks.prompts import Frame, Ids, encode
from .item import Item


class Prompt(NamedTuple):
    """`context` and what follows it, `question`, as ids; `dropped` context tokens were cut out."""

    context: Ids
    question: Ids
    dropped: int


@attrs.frozen
class Chat:
    """Writes items in a model's chat template, or one after the other where it has none.

    A context that is longer than the model's positions (`most` tokens with question and reply)
    loses its middle, as in LongBench.
    """

    tokenizer: PreTrainedTokenizerBase
    most: int | None = None
    before: str = attrs.field(init=False, default="")
    after: str = attrs.field(init=False, default="")

    def __attrs_post_init__(self) -> None:
        if self.tokenizer.chat_template:
            frame = Frame(self.tokenizer)
            object.__setattr__(self, "before", frame.before)
            object.__setattr__(self, "after", frame.after)
        elif self.tokenizer.bos_token:
            object.__setattr__(self, "before", self.tokenizer.bos_token)

    def prompt(self, item: Item) -> Prompt:
        """The ids of an item; questions about one context share the context's."""
        # The blank line belongs to the question: what follows must not change the context's ids.
        opening = encode(self.tokenizer, self.before)
        context = encode(self.tokenizer, item.context.rstrip())
        question = encode(self.tokenizer, f"\n\n{item.question.strip()}{self.after}{item.lead}")
        over = 0
        if self.most is not None:
            room = self.most - len(opening) - len(question) - item.new_tokens
            if room < 2:
                raise ValueError(f"{item.task}: {self.most} positions hold no context")
            over = max(len(context) - room, 0)
            if over:
                head = room // 2
                context = context[:head] + context[len(context) - (room - head) :]
        return Prompt(opening + context, question, over)
