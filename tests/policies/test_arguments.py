"""Every wrong argument names itself and what was wanted."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, per_layer
from kvpolicy.admission import DuoAttention, LocalAttention, RandomGate, WriteGate, any_of
from kvpolicy.budget import Adaptive, Pyramid, Ratio, Tokens, TotalCap
from kvpolicy.eviction import AtPromptEnd, SnapKV
from kvpolicy.selection import Quest

NAN = float("nan")
FULL = ((True, False),)


def gate(**kwargs):
    weights = {
        "norm_pre": torch.ones(1, 4),
        "norm_post": torch.ones(1, 4),
        "w1": torch.ones(1, 2, 3, 8),
        "b1": torch.ones(1, 2, 3),
        "w2": torch.ones(1, 2, 3),
        "b2": torch.ones(1, 2),
    }
    return WriteGate(**weights | kwargs)


TABLE = [
    (LocalAttention, {"window": 0}, ValueError, "window: wanted at least 1, got 0"),
    (LocalAttention, {"window": 8.0}, TypeError, "window: wanted an int .*8.0"),
    (LocalAttention, {"sinks": -1}, ValueError, "sinks: wanted at least 0, got -1"),
    (LocalAttention, {"sinks": True}, TypeError, "sinks: wanted an int .*True"),
    (RandomGate, {"sparsity": 1.5}, ValueError, r"sparsity: wanted a number in \[0, 1\], got 1.5"),
    (RandomGate, {"sparsity": NAN}, ValueError, "sparsity: .*got nan"),
    (RandomGate, {"sparsity": "x"}, TypeError, "sparsity: wanted a number .*'x'"),
    (RandomGate, {"sparsity": 0.5, "seed": 1.5}, TypeError, "seed: wanted an int .*1.5"),
    (gate, {"threshold": 1.1}, ValueError, "threshold: wanted .*got 1.1"),
    (gate, {"threshold": NAN}, ValueError, "threshold: wanted .*got nan"),
    (gate, {"threshold": None}, TypeError, "threshold: wanted .*got None"),
    (gate, {"inclusive": 1}, TypeError, "inclusive: wanted a bool, got 1"),
    (gate, {"window": 0}, ValueError, "window: wanted at least 1, got 0"),
    (gate, {"backend": "cuda"}, ValueError, "backend: wanted one of .*got 'cuda'"),
    (gate, {"b2": [0.0]}, TypeError, "b2: wanted a tensor, got"),
    (gate, {"w1": torch.ones(2, 3, 8)}, ValueError, r"w1, norm_pre: wanted shapes.*\(2, 3, 8\)"),
    (gate, {"w1": torch.ones(1, 2, 3, 7)}, ValueError, r"w1: wanted .*\(1, 2, 3, 8\).*3, 7\)"),
    (gate, {"b2": torch.full((1, 2), NAN)}, ValueError, "b2: wanted finite weights, got NaN"),
    (gate, {"b1": torch.ones(1, 2, 3).int()}, TypeError, "b1: wanted floats.*int32"),
    (DuoAttention, {"full_heads": ()}, ValueError, "full_heads: wanted a row"),
    (DuoAttention, {"full_heads": ((),)}, ValueError, "full_heads: wanted a row"),
    (DuoAttention, {"full_heads": ((True,), (True, False))}, ValueError, "layer 0 has 1 .*1 has 2"),
    (DuoAttention, {"full_heads": ((0.5,),)}, TypeError, "full_heads: wanted bools, got 0.5"),
    (DuoAttention, {"full_heads": FULL, "sinks": -1}, ValueError, "sinks: wanted at least 0"),
    (DuoAttention, {"full_heads": FULL, "window": 0}, ValueError, "window: wanted at least 1"),
    (Quest, {"budget": 0}, ValueError, "tokens: wanted at least 1, got 0"),
    (Quest, {"budget": Ratio(0.5)}, TypeError, "budget.*Tokens.*Ratio"),
    (Quest, {"budget": True}, TypeError, "budget.*True"),
    (Quest, {"budget": 64, "group": "sum"}, ValueError, "group: wanted one of .*got 'sum'"),
    (Quest, {"budget": 64, "first": -1}, ValueError, "first: wanted at least 0, got -1"),
    (Quest, {"budget": 64, "last": "full"}, TypeError, "last: wanted an int .*'full'"),
    (Quest, {"budget": 64, "last": 0.5}, TypeError, "last: wanted an int .*0.5"),
    (SnapKV, {"budget": 0}, ValueError, "tokens: wanted at least 1, got 0"),
    (SnapKV, {"budget": 0.5}, TypeError, "budget: wanted a budget, got 0.5"),
    (SnapKV, {"budget": 64, "when": "always"}, ValueError, "when: wanted one of .*'always'"),
    (SnapKV, {"budget": 64, "observation": 0}, ValueError, "observation: wanted at least 1"),
    (SnapKV, {"budget": 64, "kernel": 4}, ValueError, "kernel: wanted an odd number, got 4"),
    (SnapKV, {"budget": 64, "kernel": -1}, ValueError, "kernel: wanted at least 1, got -1"),
    (SnapKV, {"budget": 64, "pooling": "sum"}, ValueError, "pooling: wanted one of .*'sum'"),
    (SnapKV, {"budget": 64, "group": "each"}, ValueError, "group: wanted one of .*'each'"),
    (SnapKV, {"budget": 64, "normalize": 1}, TypeError, "normalize: wanted one of .*got 1"),
    (
        AtPromptEnd,
        {"admission": SnapKV(budget=64)},
        TypeError,
        "admission: wanted an admission, got",
    ),
    (Tokens, {"tokens": 2.0}, TypeError, "tokens: wanted an int .*2.0"),
    (Ratio, {"ratio": 0}, ValueError, r"ratio: wanted a number in \(0, 1\], got 0"),
    (Ratio, {"ratio": 1.01}, ValueError, "ratio: wanted .*got 1.01"),
    (Adaptive, {"base": 64.0}, TypeError, "base: wanted a budget, got 64.0"),
    (Adaptive, {"base": 64, "form": "mean"}, ValueError, "form: wanted one of .*'mean'"),
    (Adaptive, {"base": TotalCap(64)}, TypeError, "base: wanted a budget per head, got TotalCap"),
    (Adaptive, {"base": Tokens(64), "floor": 1.2}, ValueError, "floor: wanted .*got 1.2"),
    (Pyramid, {"base": "x"}, TypeError, "base: wanted a budget, got 'x'"),
    (Pyramid, {"base": TotalCap(64)}, TypeError, "base: wanted a budget per head, got TotalCap"),
    (Pyramid, {"base": Tokens(64), "beta": 0.5}, ValueError, "beta: wanted .*at least 1, got 0.5"),
    (Pyramid, {"base": Tokens(64), "beta": NAN}, ValueError, "beta: wanted .*got nan"),
    (Pyramid, {"base": Tokens(64), "beta": "x"}, TypeError, "beta: wanted .*got 'x'"),
    (Pyramid, {"base": Tokens(64), "observation": -1}, ValueError, "observation: wanted at least"),
    (TotalCap, {"tokens": 0}, ValueError, "tokens: wanted at least 1, got 0"),
    (TotalCap, {"tokens": 9, "drop": 0}, ValueError, r"drop: wanted a number in \(0, 1\], got 0"),
    (TotalCap, {"tokens": 9, "drop": "x"}, TypeError, "drop: wanted .*got 'x'"),
]


@pytest.mark.parametrize(("make", "kwargs", "error", "message"), TABLE)
def test_a_wrong_argument_names_itself(make, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


HINTS = [
    (SnapKV, {"budget": 0.5}, r"got 0\.5; write Ratio\(0\.5\) for this part of the tokens seen"),
    (SnapKV, {"budget": 64.0}, r"got 64\.0; write Tokens\(64\)"),
    (SnapKV, {"budget": "many"}, r"got 'many'; write Tokens\(1024\) .* or Ratio\(0\.5\)"),
    (SnapKV, {"budget": Ratio}, r"got the class Ratio; write Ratio\(\.\.\.\)"),
    (Adaptive, {"base": 0.25}, r"base: .*got 0\.25; write Ratio\(0\.25\)"),
    (Quest, {"budget": Ratio(0.5)}, r"budget: wanted Tokens\(n\) or an int, .*; write budget=1024"),
    (LocalAttention, {"window": 8.0}, r"got 8\.0; write 8"),
    (SnapKV, {"budget": 64, "kernel": 4}, "got 4; write 5"),
    (AtPromptEnd, {"admission": LocalAttention}, r"got the class LocalAttention; write LocalAtt"),
    (CachePipeline, {"admission": SnapKV}, r"admission: wanted an admission, got the class SnapKV"),
    (CachePipeline, {"selection": Quest}, r"selection: .*; write Quest\(\.\.\.\)"),
    (CachePipeline, {"admission": Quest(budget=9)}, r"; write selection=Quest\(\.\.\.\)"),
    (CachePipeline, {"eviction": LocalAttention()}, r"eviction: wanted .*; write admission=Local"),
    (CachePipeline, {"selection": SnapKV(budget=9)}, "selection: wanted .*; write eviction=SnapKV"),
    (CachePipeline, {"eviction": 64}, "eviction: wanted an eviction, got 64$"),
]


@pytest.mark.parametrize(("make", "kwargs", "message"), HINTS)
def test_a_message_says_what_to_write(make, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        make(**kwargs)
    assert "Attribute(" not in str(caught.value) and len(str(caught.value)) < 300


def test_one_admission_at_a_time():
    with pytest.raises(TypeError, match=r"write them one by one, or with a star: any_of\(\*pol"):
        any_of([LocalAttention(), LocalAttention()])


@pytest.mark.parametrize("layers", [range(2, 3 * 10**7), range(10**30), 1 << 16])
def test_ranges_without_end_are_refused_at_once(layers):
    with pytest.raises(ValueError, match="layers: wanted layers below 65,536"):
        per_layer(LocalAttention(), {layers: LocalAttention()})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("threshold", NAN, ValueError),
        ("threshold", "0.5", TypeError),
        ("sparsity", NAN, ValueError),
        ("sparsity", True, TypeError),
        ("sparsity", 1.5, ValueError),
    ],
)
def test_a_pattern_is_cut_at_a_number(name, value, error):
    with pytest.raises(error, match=rf"{name}: wanted a number in \[0, 1\], got"):
        DuoAttention.from_pretrained("no such folder", **{name: value})
    with pytest.raises((TypeError, ValueError), match="seed: wanted"):
        DuoAttention.from_pretrained("no such folder", sparsity=0.5, seed=-1)


@pytest.mark.parametrize("make", [LocalAttention, RandomGate, WriteGate, DuoAttention])
def test_admissions_take_keywords_only(make):
    with pytest.raises(TypeError, match="positional argument"):
        make(1)


def test_an_int_budget_is_tokens():
    assert SnapKV(budget=64).budget == Quest(budget=64).budget == Tokens(64)
    assert Adaptive(64) == Adaptive(Tokens(64)) and Pyramid(64) == Pyramid(Tokens(64))
