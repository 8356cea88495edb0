"""An ablation that takes seconds; its numbers mean nothing."""

from __future__ import annotations

from ...training import GateTraining
from .lab import Recipe

TINY = Recipe(
    training=GateTraining(steps=2, lam=0.16, window=16, length=128, batch_size=1, lr=0.1),
    taus=(0.1, 0.5),
    lambdas=(0.16, 2.56),
    windows=(1, 16),
    widths=(1.0, 4.0),
    parts=(0.5,),
    length=1300,
    contexts=2,
    page_size=16,
)


def tiny_prose() -> str:
    """Short sentences, so that much fits between a few tokens of one letter each."""
    names = [a + b + c for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]
    return "\n\n".join(f"The {name} went home. It saw many a {name}ing." for name in names)
