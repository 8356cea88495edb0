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

    def draw(heads, dim):
        whole = torch.randint(-128, 128, (heads, length, dim), generator=rng)
        return (whole / 64).to(spec.dtype)

    def layer(sizes):
        key, value = (sizes.kv_heads, sizes.head_dim), (sizes.kv_heads, sizes.value_dim)
        return tuple(draw(*x) for x in ((sizes.heads, sizes.head_dim), key, value, key))

    return [layer(spec.at(index)) for index in range(spec.layers)]


def hidden_of(pre):
    """The attention input `[..., T, Hkv * D]` that stands beside keys before RoPE."""
    return pre.transpose(-3, -2).flatten(-2)


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
