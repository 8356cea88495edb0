"""The conformance kit passes every built-in policy."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import (
    Adaptive,
    AdmitAll,
    AtPromptEnd,
    DuoAttention,
    KeepAll,
    LocalAttention,
    Pyramid,
    Quest,
    RandomGate,
    Ratio,
    SelectAll,
    SnapKV,
    Tokens,
    TotalCap,
    WriteGate,
    all_of,
    any_of,
    per_layer,
)
from kvpolicy.testing import (
    check_admission,
    check_eviction,
    check_selection,
)

HEADS = 2


def gate(layers=2, width=8, dim=16):
    rng = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    return WriteGate(
        norm_pre=1 + 0.1 * draw(layers, dim),
        norm_post=1 + 0.1 * draw(layers, dim),
        w1=0.3 * draw(layers, HEADS, width, 2 * dim),
        b1=draw(layers, HEADS, width),
        w2=draw(layers, HEADS, width),
        b2=draw(layers, HEADS),
        threshold=0.5,
        window=8,
    )


LOCAL = LocalAttention(window=8)
RANDOM = RandomGate(sparsity=0.5)
DUO = DuoAttention(full_heads=[[True, False], [False, False]], sinks=4, window=8)


@pytest.mark.parametrize(
    "policy",
    [
        AdmitAll(),
        gate(),
        RANDOM,
        LOCAL,
        DUO,
        any_of(gate(), LOCAL),
        all_of(RANDOM, gate()),
        per_layer(AdmitAll(), {1: RANDOM}),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_built_in_admission_passes(policy):
    check_admission(policy, kv_heads=HEADS)


def test_built_in_admission_passes_in_bfloat16():
    check_admission(gate(), kv_heads=HEADS, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "policy",
    [
        Quest(budget=40, group="max"),
        Quest(budget=40, group="mean"),
        Quest(budget=40, group="each"),
        Quest(budget=56, first=1, last=2),
        Quest(budget=40, last="partial"),
        per_layer(Quest(budget=40), {0: Quest(budget=24, first=1)}),
    ],
    ids=str,
)
def test_quest_passes_as_an_upper_bound(policy):
    check_selection(policy, upper_bound=True)


@pytest.mark.parametrize(
    "policy", [SelectAll(), per_layer(SelectAll(), {1: Quest(budget=40)})], ids=str
)
def test_built_in_selection_passes(policy):
    check_selection(policy)


@pytest.mark.parametrize(
    "policy",
    [
        KeepAll(),
        SnapKV(budget=40),
        SnapKV(budget=40, pooling="max", group="max", normalize="global", observation=5, kernel=1),
        SnapKV(budget=40, when="decode"),
        SnapKV(budget=Ratio(0.5)),
        SnapKV(budget=Adaptive(Tokens(40))),
        SnapKV(budget=Pyramid(Tokens(40), observation=8)),
        SnapKV(budget=TotalCap(100), when="decode"),
        AtPromptEnd(DUO),
        AtPromptEnd(gate()),
        AtPromptEnd(RANDOM),
        per_layer(KeepAll(), {1: SnapKV(budget=40)}),
    ],
    ids=str,
)
def test_built_in_eviction_passes(policy):
    check_eviction(policy)


@pytest.mark.parametrize("check", [check_admission, check_selection, check_eviction])
def test_other_values_are_no_policies(check):
    with pytest.raises(TypeError, match="policy: wanted"):
        check(object())
