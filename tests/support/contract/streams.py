"""Tokens of sequences, and the calls they come in."""

from __future__ import annotations

import random

import torch


def stream(spec, length, seed):
    """Tokens of one sequence, `[layer] -> (q, k, v, key_pre)`, multiples of 1/64 in [-2, 2).

    Products and sums of these are exact in float32, so pages' scores do not depend on the order of
    summation and their ties are real ties.
    """
    rng = torch.Generator().manual_seed(seed)
    sizes = (spec.heads, spec.kv_heads, spec.kv_heads, spec.kv_heads)

    def draw(heads):
        whole = torch.randint(-128, 128, (heads, length, spec.head_dim), generator=rng)
        return (whole / 64).to(spec.dtype)

    return [tuple(draw(heads) for heads in sizes) for _ in range(spec.layers)]


def piece(tokens, start, stop):
    return [tuple(x[:, start:stop] for x in layer) for layer in tokens]


def random_cuts(rows, seed, longest):
    """Calls of random sizes, 0 included."""
    rng, left, calls = random.Random(seed), list(rows), []
    while any(left):
        now = [min(n, rng.randint(0, longest)) for n in left]
        left = [n - c for n, c in zip(left, now, strict=True)]
        if any(now):
            calls.append(now)
    return calls
