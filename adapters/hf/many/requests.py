"""What goes into many requests, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import attrs
from torch import Tensor

from ...._arguments import wrong
from ...._fields import MOST_INT, check_int, shown

Reason = Literal["eos", "length", "stop_string", "cancelled", "error"]


class Request:
    """One prompt and how to go on from it.

    Args:
        inputs: token ids, a list or a tensor `[S]` or `[1, S]`; or a text, where the call has a
            tokenizer. All are real tokens.
        id: anything that tells the request from others; it comes back with what it finished as.
        seed: of its draws, where it samples: they depend on nothing else.
        on_token: called with each new token id as it comes; what it raises ends this request.
        options: those of transformers' `generate`: `generation_config`, its fields
            (`max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `eos_token_id`, `stop_strings`, ...), `logits_processor` and
            `prefix_allowed_tokens_fn`. What is not given is the model's.
    """

    def __init__(
        self,
        inputs: str | Tensor | Sequence[int],
        *,
        id: Hashable = None,
        seed: int = 0,
        on_token: Callable[[int], object] | None = None,
        **options: Any,
    ) -> None:
        check_int("seed", seed, 0, MOST_INT)
        if on_token is not None and not callable(on_token):
            raise TypeError(wrong("on_token", "a function of a token id", on_token))
        self.inputs, self.id, self.seed, self.on_token = inputs, id, seed, on_token
        self.options = options
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the request before its next token, whatever it waits for; from any thread."""
        self.cancelled = True

    def __repr__(self) -> str:
        return f"Request(id={self.id!r}, inputs={shown(self.inputs)})"


@attrs.frozen(kw_only=True)
class Timings:
    """Seconds since a request was taken from the iterable; None for what did not come.

    `started` when its first prompt tokens were read, `first_token`, and `finished`.
    """

    started: float | None = None
    first_token: float | None = None
    finished: float


@attrs.frozen(kw_only=True)
class Held:
    """What a sequence held when it finished.

    `tokens` went through; `stored` `[layer][head]` are the tokens kept, the window's included.
    `bytes` are those of its pages.
    """

    tokens: int
    stored: tuple[tuple[int, ...], ...]
    bytes: int

    @property
    def kept(self) -> float:
        """Mean fraction of its tokens that a head kept."""
        heads = [n for layer in self.stored for n in layer]
        return sum(heads) / (len(heads) * self.tokens) if heads and self.tokens else 1.0


@attrs.frozen(kw_only=True, eq=False)
class Finished:
    """A request that ended.

    `tokens` are the new ones, what ended them included; `text` is theirs where there is a
    tokenizer. `reason` says why it ended, and `error` what was raised where that is "error".
    `prompt_tokens` counts what came before them, and `timings` are in seconds. `held` is None
    where nothing was read. `parked` counts how often it had to wait outside.
    """

    request: Request
    tokens: list[int]
    text: str | None
    reason: Reason
    error: BaseException | None
    prompt_tokens: int
    timings: Timings
    held: Held | None
    parked: int

    @property
    def id(self) -> Hashable:
        """The request's."""
        return self.request.id
