"""A conversation with a model through one cache: turns in, answers streamed out, a report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

from .progress import span

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.hf import Attachment

MARK = "kvpolicy-answer"  # stands for an answer where a chat template is asked what follows one


class Stream(TextStreamer):
    """Prints tokens as they come, without the prompt, and counts them."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self.first: float | None = None  # when the first token came

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.first = self.first or time.monotonic()
            self.tokens += value.numel()
        super().put(value)  # type: ignore[no-untyped-call]


class Talk:
    """Turns and answers in one cache of an attached model.

    What was answered stays in the cache as it was sampled; only what is new is read.

    Args:
        attached: the attachment.
        tokenizer: the model's.
        options: of generate.
        raw: text goes to the model as it is; otherwise in the tokenizer's chat template.
        system: a system prompt.
    """

    def __init__(
        self,
        attached: Attachment,
        tokenizer: Any,
        options: dict[str, Any],
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> None:
        self.attached, self.tokenizer = attached, tokenizer
        ends = attached.model.generation_config.pad_token_id
        # transformers warns where nothing says how rows are padded; here is one row.
        self.options = options | ({"pad_token_id": tokenizer.eos_token_id} if ends is None else {})
        self.raw = raw or tokenizer.chat_template is None
        if system is not None and self.raw:
            raise ValueError("system: wanted a chat template to put it in, which the model has not")
        self.head = [] if system is None else [{"role": "system", "content": system}]
        self.cache = attached.new_cache()
        self.ids: Tensor | None = None  # [1, S], all that was said
        self.read = self.answered = 0  # tokens
        self.reading = self.answering = 0.0  # seconds

    def say(self, text: str) -> None:
        """Reads a turn and prints the answer while it comes."""
        import torch

        new = self._encode(text)
        if not new:
            raise ValueError("prompt: wanted text, got none")
        turn = torch.tensor([new], device=self.attached.base.device)
        ids = turn if self.ids is None else torch.cat([self.ids, turn], 1)
        stream, began = Stream(self.tokenizer), time.monotonic()
        self.ids = self.attached.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            streamer=stream,
            **self.options,
        )
        ended = time.monotonic()
        first = stream.first or ended
        self.read += len(new)
        self.answered += stream.tokens
        self.reading += first - began
        self.answering += ended - first

    def report(self) -> str:
        """How fast it was, and what the cache holds."""
        counted = max(self.answered - 1, 0)  # the first token belongs to the prompt
        speed = f", {counted / self.answering:.1f} a second" if counted and self.answering else ""
        lines = [
            f"{self.read:,} tokens read in {span(self.reading)}, {self.answered:,} answered in "
            f"{span(self.answering)}{speed}",
            f"decoding: {self.attached.decoding}",
        ]
        return "\n".join([*lines, "", str(self.cache.report())] if self.read else ["nothing read"])

    def _encode(self, text: str) -> list[int]:
        """The ids of a turn: of its text, or of all that the template puts around it."""
        if self.raw:
            found: list[int] = self.tokenizer(text, add_special_tokens=self.ids is None).input_ids
            return found
        turn = {"role": "user", "content": text}
        if self.ids is None:
            said = self._template([*self.head, turn])
        else:
            before = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
            said = self._template([*self.head, *before, turn]).rpartition(MARK)[2]
            end = self.tokenizer.eos_token
            if end and said.startswith(end) and int(self.ids[0, -1]) == self.tokenizer.eos_token_id:
                said = said.removeprefix(end)  # it was answered
        new: list[int] = self.tokenizer(said, add_special_tokens=False).input_ids
        return new

    def _template(self, turns: list[dict[str, str]]) -> str:
        found: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return found


def options_of(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """Of generate: greedy at temperature 0."""
    found: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        found |= {"temperature": temperature, "top_p": top_p}
    return found
