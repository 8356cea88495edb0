"""Draws depend on the seed and the place of a token alone, and follow the chances."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from kvpolicy.adapters.hf.many.sampling import alike, choose, noise

MASK = (1 << 64) - 1


def splitmix(x):
    """The x-th number of splitmix64 from state 0, as its author writes it."""
    z = (x + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


@attrs.define
class Row:
    processors: LogitsProcessorList
    sample: bool = False
    seed: int = 0
    made: int = 0
    seen: torch.Tensor | None = None


def test_noise_is_that_of_splitmix64():
    found = noise(torch.tensor([5, 2**40]), torch.tensor([0, 7]), 3)
    for row, (seed, made) in enumerate([(5, 0), (2**40, 7)]):
        base = splitmix((splitmix(seed) + made) & MASK)
        for word in range(3):
            bits = splitmix((base + word) & MASK) >> 12
            wanted = -math.log((bits + 0.5) / 2**52)
            assert float(found[row, word]) == pytest.approx(wanted, rel=1e-6)


def test_draws_follow_the_chances():
    chances = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    rows = [Row(LogitsProcessorList(), sample=True, seed=n, made=3) for n in range(4000)]
    found = choose(rows, chances.log().expand(4000, 5)).bincount(minlength=5) / 4000
    assert (found - chances).abs().max() < 0.03 and found[4] == 0
    steps = [Row(LogitsProcessorList(), sample=True, seed=1, made=n) for n in range(4000)]
    assert (choose(steps, chances.log().expand(4000, 5)).bincount() / 4000)[1] > 0.2


def test_each_row_gets_what_it_gets_alone():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    seen = torch.arange(20)[None]
    warp = lambda t: LogitsProcessorList([TemperatureLogitsWarper(t), TopKLogitsWarper(9)])  # noqa: E731
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
    rows = [
        Row(LogitsProcessorList()),
        Row(warp(0.7), sample=True, seed=4),
        Row(penalty, seen=seen),
        Row(warp(0.7), sample=True, seed=5),
        Row(warp(1.3), sample=True, seed=4),
        Row(LogitsProcessorList(), sample=True, seed=4, made=8),
    ]
    together = choose(rows, logits).tolist()
    assert together == [int(choose([row], logits[n : n + 1])) for n, row in enumerate(rows)]
    assert together[0] == int(logits[0].argmax())
    assert together[2] == int(penalty(seen, logits[2:3].clone()).argmax())
    assert alike(rows[1].processors) == alike(rows[3].processors) != alike(rows[4].processors)
    assert alike(penalty) is None


def test_the_logits_stay_as_they_are():
    logits = torch.zeros(1, 4)
    choose([Row(LogitsProcessorList([TopKLogitsWarper(1)]), sample=True)], logits)
    assert bool((logits == 0).all())
