"""Attention as a formula, and what it asks besides: softcap, sinks, chunks, another value dim."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from tests.support.kernels.pool import DEVICE


@attrs.frozen(kw_only=True)
class Asks:
    """What a decoder's attention asks; `sink` is the largest sink, those of other heads lie below.

    Queries are `sharp` times as long as normal numbers.
    """

    softcap: float | None = None
    sink: float | None = None
    chunk: int | None = None
    dim_v: int | None = None
    sharp: float = 1.0

    def sinks(self, heads: int) -> Tensor | None:
        """`[Hq]`, in bfloat16 as gpt-oss has them."""
        if self.sink is None:
            return None
        return (self.sink - torch.arange(heads) % 3).to(torch.bfloat16).to(DEVICE)

    def options(self, heads: int) -> dict[str, float | Tensor | int]:
        """The arguments of an op."""
        given = dict(softcap=self.softcap, sinks=self.sinks(heads), chunk=self.chunk)
        return {name: x for name, x in given.items() if x is not None}

    def less(self) -> list[Asks]:
        """The same, each without one of the things asked."""
        asked = [x for x in ("softcap", "sink", "chunk") if getattr(self, x) is not None]
        return [attrs.evolve(self, **{name: None}) for name in asked]

    def near(self, query_at: Tensor, key_at: Tensor) -> Tensor:
        """Whether keys are in the chunks of queries, whose positions these are."""
        if self.chunk is None:
            return torch.ones_like(query_at == key_at)
        return (query_at / self.chunk).floor() == (key_at / self.chunk).floor()


NOTHING = Asks()


def attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, asks: Asks,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Heads `[..., M, Dv]` over the visible `[..., M, N]` of their keys.

    `sinks` broadcast to `[..., M]`. Computes in the inputs' dtype.
    """
    scores = query @ key.mT * scale
    if asks.softcap is not None:
        scores = asks.softcap * torch.tanh(scores / asks.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores).expand(scores.shape[:-1])[..., None]
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., : key.shape[-2]] @ value


def assert_asked_matters(
    formula: Callable[[torch.dtype, Asks], Tensor], asks: Asks, exact: Tensor, allowed: float
) -> None:
    """Leaving out any of what is asked changes the result far beyond the budget."""
    times = 1000 if allowed < 1e-4 else 5
    for less in asks.less():
        change = (formula(torch.float64, less) - exact).abs().max().item()
        assert change > times * allowed, f"{less}: changes {change:.3g}, allowed {allowed:.3g}"
