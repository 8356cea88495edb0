"""Items as token ids: a context, and what is asked after it with the start of the reply."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from transformers import PreTrainedTokenizerBase

from ..tasks.prompts import Frame, Ids, encode
from .item import Item


@attrs.frozen(kw_only=True)
class Reading:
    """A context that is read once, and the questions that are asked on copies of it.

    `new_tokens` are those that each reply may have; `dropped` context tokens were cut out.
    """

    context: Ids
    questions: tuple[Ids, ...]
    new_tokens: tuple[int, ...]
    dropped: int = 0


@attrs.frozen
class Chat:
    """Writes items in a model's chat template, or one after the other where it has none.

    With `seen` the question belongs to the context, and only what the template puts after it and
    the start of the reply are asked. A context that does not fit into `most` tokens with question
    and reply loses its middle, as in LongBench.
    """

    tokenizer: PreTrainedTokenizerBase
    most: int | None = None
    seen: bool = False
    before: Ids = attrs.field(init=False, default=())
    after: str = attrs.field(init=False, default="\n")

    def __attrs_post_init__(self) -> None:
        before = self.tokenizer.bos_token or ""
        if self.tokenizer.chat_template:
            frame = Frame(self.tokenizer)
            before = frame.before
            object.__setattr__(self, "after", frame.after)
        object.__setattr__(self, "before", encode(self.tokenizer, before))

    def readings(self, items: Sequence[Item]) -> list[Reading]:
        """How the items of one context are read: once, or with `seen` once a question.

        Raises:
            ValueError: a question and its reply leave no room for a context.
        """
        # The blank line belongs to the question: what follows must not change the context's ids.
        context = encode(self.tokenizer, items[0].context.rstrip())
        parts = [(item,) for item in items] if self.seen else [tuple(items)]
        return [self._reading(context, part) for part in parts]

    def _reading(self, context: Ids, items: Sequence[Item]) -> Reading:
        asked = [self._asked(item) for item in items]
        dropped = 0
        if self.most is not None:
            # What leaves least room says what all questions read.
            taken = max(
                len(seen) + len(question) + item.new_tokens
                for (seen, question), item in zip(asked, items, strict=True)
            )
            room = self.most - len(self.before) - taken
            if room < 2:
                task = items[0].task
                raise ValueError(f"{task}: {self.most} tokens hold no context beside a reply")
            dropped = max(len(context) - room, 0)
            if dropped:
                head = room // 2
                context = context[:head] + context[len(context) - (room - head) :]
        return Reading(
            context=self.before + context + asked[0][0],
            questions=tuple(question for _, question in asked),
            new_tokens=tuple(item.new_tokens for item in items),
            dropped=dropped,
        )

    def _asked(self, item: Item) -> tuple[Ids, Ids]:
        """What of a question belongs to the context, and what follows it."""
        question, reply = f"\n\n{item.question.strip()}", f"{self.after}{item.lead}"
        if self.seen:
            return encode(self.tokenizer, question), encode(self.tokenizer, reply)
        return (), encode(self.tokenizer, question + reply)
