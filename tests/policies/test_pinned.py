"""What must not change from one version to the next: the hash of random gates, and defaults."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    Adaptive,
    AtPromptEnd,
    CachePipeline,
    Eviction,
    LocalAttention,
    Pyramid,
    Quest,
    RandomGate,
    SnapKV,
    Tokens,
    Write,
    WriteGate,
)
from kvpolicy.store.fingerprint import pipeline_fingerprint

WHOLE = (1 << 64) - 1


def mix(x):
    """The finaliser of splitmix64 on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WHOLE
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WHOLE
    return x ^ (x >> 31)


def admitted(gate, layer, head, position):
    x = mix((head + (layer + 1) * 0x10001 + gate.seed * 0x100000001) & WHOLE)
    x = mix(x ^ ((position * 0x9E3779B97F4A7C15) & WHOLE))
    return (x >> 11) / 2**53 >= gate.sparsity


@pytest.mark.parametrize("seed", [0, 3, -5, 2**31 - 1, 2**40 + 11, -(2**63)])
def test_random_gates_hash_alike_everywhere(seed):
    gate, at = RandomGate(sparsity=0.4, seed=seed), torch.tensor([0, 1, 2, 77, 4096, 2**30 - 1])
    keys = torch.zeros(3, len(at), 8)
    cu = torch.tensor([0, len(at)], dtype=torch.int32)
    for layer in (0, 5):
        found = gate.admit(Write(keys, keys, at, cu, layer, range(2, 5))).tolist()
        assert found == [[admitted(gate, layer, h, n) for n in at.tolist()] for h in range(2, 5)]


def test_defaults():
    assert Eviction.queries == 0
    assert LocalAttention().window == 256
    assert Pyramid(Tokens(600)).observation == 32


def test_names_of_pipelines_are_those_of_0_1():
    """A cache that was saved with these goes on; what is new is named where it is used."""
    ones = torch.ones
    gate = WriteGate(
        norm_pre=ones(1, 4), norm_post=ones(1, 4), w1=ones(1, 2, 3, 8), b1=ones(1, 2, 3),
        w2=ones(1, 2, 3), b2=ones(1, 2),
    )  # fmt: skip
    named = {
        "90417647": CachePipeline(admission=gate, selection=Quest(budget=500)),
        "70d5c80c": CachePipeline(eviction=SnapKV(budget=Adaptive(Tokens(500))), window=64),
        "0705315d": CachePipeline(eviction=AtPromptEnd(LocalAttention(), generated="keep")),
    }
    for name, pipeline in named.items():
        assert pipeline_fingerprint(pipeline).startswith(name)
    silu = CachePipeline(admission=attrs.evolve(gate, activation="silu"))
    plain = CachePipeline(admission=gate)
    assert pipeline_fingerprint(silu) != pipeline_fingerprint(plain)
