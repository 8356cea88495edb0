"""What is known of a request while it is served."""

from __future__ import annotations

import time

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import LogitsProcessorList

from .options import Options
from .requests import Reason, Request
from .room import Outside, Source
from .sampling import alike
from .scheduler import Entry, Pages


@attrs.define(eq=False)
class Load:
    """A request, what it generated and what the scheduler's `Entry` of it does not say.

    `tokens` are those that the host knows; `made` may be more. `pages` are held, of each pool;
    `passed` tokens of all heads left the window, `stored` of them are held (see `Expected`). It
    goes on from the `begun` tokens of a `source`, `unlisted` of which are none of its ids.
    """

    request: Request
    options: Options
    pages: Pages
    device: torch.device
    arrived: float = attrs.field(factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    tokens: list[int] = attrs.field(factory=list)
    made: int = 0
    source: Source | None = None
    begun: int = 0
    unlisted: int = 0
    passed: int = 0
    stored: int = 0
    outside: Outside | None = None
    ready: int | Tensor | None = None  # its first token, until its prompt ends
    ids: Tensor | None = None

    def __attrs_post_init__(self) -> None:
        if alike(self.processors) is None:  # they read the tokens so far
            self.ids = torch.tensor([self.options.ids], device=self.device)

    @property
    def processors(self) -> LogitsProcessorList:
        return self.options.processors

    @property
    def sample(self) -> bool:
        return self.options.sample

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def seen(self) -> Tensor | None:
        """All tokens so far `[1, S]`, where a processor reads them."""
        return None if self.ids is None else self.ids[:, : len(self.options.ids) + self.made]

    def next_ids(self, read: int, count: int) -> list[int]:
        """The next `count` ids of its prompt, `read` tokens of which were read."""
        at = read - self.unlisted
        return self.options.ids[at : at + count]

    def chose(self, token: Tensor) -> None:
        """Takes the next token, a tensor without axes that the host has not seen."""
        if self.ids is not None:
            place = len(self.options.ids) + self.made
            if place == self.ids.shape[1]:
                self.ids = pad(self.ids, (0, place))  # twice as long
            self.ids[0, place] = token
        self.made += 1

    def said(self, token: int) -> Reason | None:
        """The host knows the next token; why the request ends with it, None if it goes on."""
        self.tokens.append(token)
        if self.first is None:
            self.first = time.perf_counter()
        if self.request.on_token is not None:
            self.request.on_token(token)
        if token in self.options.ends:
            return "eos"
        if self._stops():
            return "stop_string"
        return "length" if len(self.tokens) >= self.options.most else None

    def _stops(self) -> bool:
        stops = self.options.stops
        if stops is None:
            return False
        count = int(stops.maximum_token_len)
        last = [*self.options.ids[-count:], *self.tokens[-count:]][-count:]
        return bool(stops(torch.tensor([last]), None).any())


def load_of(entry: Entry) -> Load:
    """The load of an entry."""
    found = entry.load
    assert isinstance(found, Load)
    return found
