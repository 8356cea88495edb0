"""The next tokens of sequences that want different things, without a launch for each of them.

A request's draws are a function of its seed, the place of the token and the vocabulary's entries:
nothing is kept, so that neither its neighbours nor waiting changes them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Those that look at a row's scores alone, so that rows with equal ones go together.
ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_STEP, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64


class Chooses(Protocol):
    """What a choice needs of a sequence.

    `ids` `[1, S]` are all of its tokens so far, None where no processor reads them; `made` how many
    it generated.
    """

    @property
    def processors(self) -> LogitsProcessorList: ...

    @property
    def sample(self) -> bool: ...

    @property
    def seed(self) -> int: ...

    @property
    def made(self) -> int: ...

    @property
    def seen(self) -> Tensor | None: ...


def choose(rows: Sequence[Chooses], logits: Tensor) -> Tensor:
    """The next token `[N]` of each sequence, of `logits` `[N, V]` after its last one."""
    scores = logits.to(copy=True, dtype=torch.float32)
    groups: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        key = alike(row.processors)
        groups.setdefault(place if key is None else key, []).append(place)
    for key, places in groups.items():
        if key == ():
            continue
        first = rows[places[0]]
        # Those that go together do not look at ids.
        ids: Any = first.seen
        if len(places) == len(rows):
            scores = first.processors(ids, scores)
        else:
            index = torch.tensor(places, device=scores.device)
            scores.index_copy_(0, index, first.processors(ids, scores[index]).float())
    drawn = [place for place, row in enumerate(rows) if row.sample]
    if drawn:
        index = torch.tensor(drawn, device=scores.device)
        chances = scores[index].softmax(-1)
        # The largest of chance / exponential noise: what torch.multinomial draws by.
        seeds = torch.tensor([rows[n].seed for n in drawn], device=scores.device)
        made = torch.tensor([rows[n].made for n in drawn], device=scores.device)
        scores.index_copy_(0, index, chances / noise(seeds, made, scores.shape[1]))
    return scores.argmax(-1)


def alike(processors: LogitsProcessorList) -> Hashable | None:
    """What processors share that rows may go through together; None for those that may not."""
    found = []
    for one in processors:
        values = tuple(sorted(vars(one).items()))
        if type(one) not in ALONE or not all(isinstance(x, int | float) for _, x in values):
            return None
        found.append((type(one).__name__, values))
    return tuple(found)


def noise(seeds: Tensor, made: Tensor, words: int) -> Tensor:
    """Exponential noise `[N, V]` of seeds `[N]` at the `made[n]`-th token of each."""
    rows = _mixed(_mixed(seeds) + made)
    entries = torch.arange(words, device=seeds.device)
    bits = _right(_mixed(rows[:, None] + entries), 12)  # 52, so that adding a half is exact
    return -((bits.double() + 0.5) * 2.0**-52).log().float()


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's output function after a step; int64 products wrap around."""
    x = x * _signed(_STEP) + _signed(_STEP)
    x = (x ^ _right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _right(x, 27)) * _signed(_MIX[1])
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """Shifts in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
