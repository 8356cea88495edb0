"""Every field of every public class, given every kind of nonsense: refused by name, or kept."""

from __future__ import annotations

import abc
import importlib
import re
from types import SimpleNamespace
from typing import NamedTuple

import attrs
import pytest
import torch

from kvpolicy import (
    GKV,
    H2O,
    LUKV,
    RKV,
    TOVA,
    AcrossLayers,
    AdaEA,
    Adaptive,
    AdmitAll,
    AtPromptEnd,
    Budget,
    CachePipeline,
    CacheSpec,
    CapKV,
    CriticalKV,
    DBudgetKV,
    DuoAttention,
    ExpectedAttention,
    FastGen,
    FastKVzip,
    FlexPrefill,
    HeadKV,
    JudgeQ,
    KeepAll,
    KeyDiff,
    Knob,
    Knorm,
    KVPress,
    KVzap,
    KVzip,
    LagKV,
    LazyLayers,
    LocalAttention,
    PerPhase,
    Pyramid,
    QFilters,
    Quest,
    RandomGate,
    Ranked,
    Ratio,
    Rope,
    SageKV,
    SelectAll,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    Tokens,
    TopChannels,
    TotalCap,
    TriAttention,
    TrimKV,
    VerticalSlash,
    WriteGate,
    XAttention,
)
from kvpolicy._fields import shown
from kvpolicy.admission import AllOf, AnyOf
from kvpolicy.per_layer import PerLayerAdmission, PerLayerEviction, PerLayerSelection

ROOMS = (
    "",
    "._knob",
    ".admission",
    ".selection",
    ".eviction",
    ".budget",
    ".per_layer",
    ".pipeline",
    ".spec",
)
# What the library makes and users read.
MADE = {"BudgetView", "EvictionView", "LayerSizes", "Report"}
MOST = 1 << 30
NAN, INF = float("nan"), float("inf")


class Kind(NamedTuple):
    """Which values a field takes: those of `types` that `fits`, and None where `none` says so."""

    types: tuple[type, ...]
    fits: object = lambda value: True
    none: bool = False

    def takes(self, value):
        return self.none if value is None else self.of_type(value) and self.fits(value)

    def of_type(self, value):
        return type(value) in self.types


def ints(least, most=MOST, none=False):
    return Kind((int,), lambda value: least <= value <= most, none)


def numbers(fits, none=False):
    return Kind((int, float), lambda value: abs(value) < 1e300 and fits(value), none)


def words(*options):
    return Kind((str,), lambda value: value in options)


FRACTION = numbers(lambda value: 0 <= value <= 1)
POSITIVE_FRACTION = numbers(lambda value: 0 < value <= 1)
BUDGET = Kind((Tokens, Ratio, Adaptive, Pyramid, TotalCap, AcrossLayers, HeadKV, LazyLayers, LUKV))
INT_OR_OTHER = lambda value: type(value) is not int or 1 <= value <= MOST  # noqa: E731
BUDGET_OR_INT = Kind((*BUDGET.types, int), INT_OR_OTHER)
BASE = Kind((Tokens, Ratio, Adaptive, Pyramid, LUKV, int), INT_OR_OTHER)
TOKENS_OR_INT = Kind((Tokens, int), INT_OR_OTHER)
INT64 = ints(-(1 << 63), (1 << 63) - 1)
TENSOR = Kind((torch.Tensor,), lambda value: value.shape == (1, 4))
FLAG = Kind((bool,))
TILE = Kind((int,), lambda value: 1 <= value <= 1 << 16 and not value & (value - 1))
FUNCTION = Kind((type(lambda: 0), type, abc.ABCMeta))
EMPTY = Kind((tuple, list, dict), lambda value: not value)
NOTHING = Kind(())  # of the values below
ADMISSION, SELECTION = Kind((AdmitAll, LocalAttention)), Kind((SelectAll, Quest))
EVICTION = Kind((KeepAll, SnapKV))
GATE = {
    "norm_pre": torch.ones(1, 4), "norm_post": torch.ones(1, 4), "w1": torch.ones(1, 2, 3, 8),
    "b1": torch.ones(1, 2, 3), "w2": torch.ones(1, 2, 3), "b2": torch.ones(1, 2),
}  # fmt: skip
LOCAL = LocalAttention(window=8)
PRESS = SimpleNamespace(score=lambda *six: six)
WHEN = words("prompt_end", "decode")

# Class: arguments that make one, and what each field takes.
CLASSES = {
    CacheSpec: (
        {"layers": 1, "heads": MOST, "kv_heads": 1, "head_dim": 8},
        {
            **dict.fromkeys(("layers", "heads", "kv_heads", "head_dim", "interval"), ints(1)),
            "dtype": NOTHING,
            "device": words("cpu"),
            "devices": Kind((tuple, list), lambda value: not value),
            "scale": numbers(lambda value: value > 0, none=True),
            "sliding": Kind((tuple, list), lambda value: not value),
            "per_layer": Kind((tuple, list), lambda value: not value),
            "hidden": ints(1, none=True),
            "page_size": ints(1),
            "rollback": ints(0),
            "head_offset": ints(0),
            "all_kv_heads": ints(1, none=True),
            "max_bytes": ints(1, (1 << 63) - 1, none=True),
            "max_tokens": ints(1, none=True),
            "at_cap": words("raise", "evict"),
        },
    ),
    CachePipeline: (
        {"window": 8},
        {
            "admission": ADMISSION,
            "selection": SELECTION,
            "eviction": EVICTION,
            "window": ints(1, none=True),
            "backend": words("auto", "reference", "triton"),
        },
    ),
    AdmitAll: ({}, {}),
    LocalAttention: ({}, {"window": ints(1), "sinks": ints(0)}),
    RandomGate: ({"sparsity": 0.5}, {"sparsity": FRACTION, "seed": INT64}),
    WriteGate: (
        GATE,
        {
            "norm_pre": TENSOR,
            "norm_post": TENSOR,
            **dict.fromkeys(("w1", "b1", "w2", "b2"), Kind((torch.Tensor,), lambda value: False)),
            "threshold": FRACTION,
            "inclusive": FLAG,
            "window": ints(1, none=True),
            "activation": words("gelu", "silu"),
            "backend": words("reference", "triton"),
            "source": Kind((), none=True),
        },
    ),
    AdaEA: (
        {
            "mean": torch.ones(1, 1, 2, 4), "covariance": torch.ones(1, 1, 2, 4, 4),
            "thresholds": torch.ones(1, 1, 2),
        },
        {
            **dict.fromkeys(
                ("mean", "covariance", "thresholds"), Kind((torch.Tensor,), lambda value: False)
            ),
            "sinks": ints(0),
            "window": ints(1, none=True),
            "source": Kind((), none=True),
        },
    ),
    KVzap: (
        {"w2": torch.ones(1, 2, 4), "b2": torch.ones(1, 2)},
        {
            "w2": Kind((torch.Tensor,), lambda value: False),
            "b2": Kind((torch.Tensor,), lambda value: False),
            "w1": Kind((torch.Tensor,), lambda value: False, none=True),
            "b1": Kind((torch.Tensor,), lambda value: False, none=True),
            "threshold": numbers(lambda value: True),
            "window": ints(1, none=True),
            "source": Kind((), none=True),
        },
    ),
    DuoAttention: (
        {"full_heads": ((True, False),)},
        {
            "full_heads": Kind((tuple, list, dict), lambda value: False),
            "sinks": ints(0),
            "window": ints(1),
            "mask": Kind((torch.Tensor,), none=True),
            "source": Kind((), none=True),
        },
    ),
    AnyOf: ({"policies": (LOCAL,)}, {"policies": Kind((tuple,), lambda value: False)}),
    AllOf: ({"policies": (LOCAL,)}, {"policies": Kind((tuple,), lambda value: False)}),
    SelectAll: ({}, {}),
    Quest: (
        {"budget": 64},
        {
            "budget": TOKENS_OR_INT,
            "first": ints(0),
            "last": ints(0),
            "group": words("max", "mean", "each"),
        },
    ),
    TopChannels: (
        {"budget": 64},
        {
            "budget": TOKENS_OR_INT,
            "channels": ints(1),
            "first": ints(0),
            "last": ints(0),
            "group": words("max", "mean", "each"),
        },
    ),
    XAttention: (
        {},
        {
            "threshold": FRACTION,
            "stride": Kind((int,), lambda value: 1 <= value <= 128 and not value & (value - 1)),
            "tile": Kind((int,), lambda value: False),  # of those below no multiple of the stride
        },
    ),
    FlexPrefill: (
        {},
        {
            "gamma": POSITIVE_FRACTION,
            "tau": FRACTION,
            "min_budget": ints(1),
            "max_budget": ints(512, none=True),
            "tile": TILE,
        },
    ),
    VerticalSlash: (
        {},
        {
            "vertical": ints(1),
            "slash": ints(0),
            "queries": ints(1),
            "first": ints(0),
            "nearest": ints(0),
            "tile": TILE,
        },
    ),
    PerPhase: ({}, {"prefill": SELECTION, "decode": SELECTION}),
    KeepAll: ({}, {}),
    SnapKV: (
        {"budget": 64},
        {
            "budget": BUDGET_OR_INT,
            "when": WHEN,
            "observation": ints(1),
            "kernel": Kind((int,), lambda value: 1 <= value <= MOST and value % 2),
            "pooling": words("avg", "max"),
            "group": words("mean", "max"),
            "normalize": words("visible", "global"),
        },
    ),
    StreamingLLM: (
        {"budget": 64},
        {"budget": BUDGET_OR_INT, "sinks": ints(0), "when": WHEN},
    ),
    H2O: (
        {"budget": 64},
        {"budget": BUDGET_OR_INT, "when": WHEN, "group": words("mean", "max", "sum"),
         "average": FLAG},
    ),
    TOVA: (
        {"budget": 64},
        {
            "budget": BUDGET_OR_INT,
            "group": words("mean", "max"),
            "across_heads": FLAG,
            "when": WHEN,
        },
    ),
    KeyDiff: ({"budget": 64}, {"budget": BUDGET_OR_INT, "when": WHEN}),
    Knorm: ({"budget": 64}, {"budget": BUDGET_OR_INT, "when": WHEN}),
    LagKV: (
        {"budget": 64},
        {
            "budget": BUDGET_OR_INT,
            "sinks": ints(0),
            "lag": ints(2),
            "cross_scoring": FLAG,
            "when": WHEN,
        },
    ),
    GKV: (
        {"budget": 64},
        {"budget": BUDGET_OR_INT, "when": WHEN, "observation": ints(1), "alpha": FRACTION},
    ),
    KVzip: ({"budget": 64}, {"budget": BUDGET_OR_INT, "sinks": ints(0)}),
    Ranked: (
        {"budget": 64, "gate": KVzap(w2=torch.ones(1, 2, 4), b2=torch.ones(1, 2))},
        {"gate": Kind((AdmitAll, LocalAttention), lambda value: False), "budget": BUDGET_OR_INT,
         "when": WHEN, "sinks": ints(0)},
    ),
    TrimKV: (
        {"budget": 64, "w1": torch.ones(1, 3, 4), "b1": torch.ones(1, 3),
         "w2": torch.ones(1, 2, 3), "b2": torch.ones(1, 2)},
        {
            "budget": BUDGET_OR_INT,
            **dict.fromkeys(("w1", "b1", "w2", "b2"), Kind((torch.Tensor,), lambda value: False)),
            "when": WHEN,
            "source": Kind((), none=True),
        },
    ),
    FastKVzip: (
        {"budget": 64, "q": torch.ones(1, 8, 3), "q_bias": torch.ones(1, 8),
         "k": torch.ones(1, 8, 3), "q_norm": torch.ones(1, 4), "k_norm": torch.ones(1, 4),
         "base": torch.ones(1, 2, 1, 1, 4), "bias": torch.ones(1, 2, 1, 1)},
        {
            "budget": BUDGET_OR_INT,
            **dict.fromkeys(("q", "q_bias", "k"), Kind((torch.Tensor,), lambda value: False)),
            **dict.fromkeys(("q_norm", "k_norm"), TENSOR),
            **dict.fromkeys(("base", "bias"), Kind((torch.Tensor,), lambda value: False)),
            "when": WHEN,
            "sinks": ints(0),
            "source": Kind((), none=True),
        },
    ),
    QFilters: (
        {"budget": 64, "filters": torch.ones(1, 2, 4)},
        {
            "budget": BUDGET_OR_INT,
            "filters": Kind((torch.Tensor,), lambda value: False),
            "when": WHEN,
            "source": Kind((), none=True),
        },
    ),
    ExpectedAttention: (
        {"budget": 64},
        {
            "budget": BUDGET_OR_INT,
            "when": WHEN,
            "future": ints(1),
            "sinks": ints(0),
            "covariance": FLAG,
            "value_norm": FLAG,
            "epsilon": numbers(lambda value: value >= 0),
        },
    ),
    CapKV: (
        {"budget": 64},
        {
            "budget": BUDGET_OR_INT,
            "when": WHEN,
            "tau": numbers(lambda value: value >= 0),
            "future": ints(1),
            "sinks": ints(0),
            "epsilon": numbers(lambda value: value >= 0),
        },
    ),
    CriticalKV: (
        {"eviction": SnapKV(budget=64)},
        {
            "eviction": Kind((SnapKV,)),
            "epsilon": numbers(lambda value: value >= 0),
            "first": FRACTION,
        },
    ),
    RKV: (
        {"budget": 64},
        {
            "budget": BUDGET_OR_INT,
            "when": WHEN,
            "observation": ints(1),
            "kernel": Kind((int,), lambda value: 1 <= value <= MOST and value % 2),
            "mix": FRACTION,
            "threshold": FRACTION,
            "group": words("mean", "max"),
        },
    ),
    TriAttention: (
        {"budget": 64, **dict.fromkeys(("real", "imaginary", "size"), torch.ones(1, 2, 4))},
        {
            "budget": BUDGET_OR_INT,
            **dict.fromkeys(
                ("real", "imaginary", "size"), Kind((torch.Tensor,), lambda value: False)
            ),
            "when": WHEN,
            "farthest": ints(1),
            "group": words("mean", "max"),
            "normalize": FLAG,
            "keep_prompt": FLAG,
            "source": Kind((), none=True),
        },
    ),
    KVPress: (
        {"press": PRESS, "budget": 64},
        {
            "press": NOTHING,
            "budget": BUDGET_OR_INT,
            "when": WHEN,
            "reads": words("queries", "statistics", "hidden"),
            "inputs": ints(0),
            "skip": ints(0),
            "output_weight": FLAG,
            "across_heads": FLAG,
        },
    ),
    SageKV: (
        {"budget": 64},
        {"budget": BUDGET_OR_INT, "sinks": ints(0), "group": words("mean", "max")},
    ),
    JudgeQ: (
        {"budget": 64, "embeds": torch.ones(3, 8)},
        {"budget": BUDGET_OR_INT, "embeds": TENSOR, "source": Kind((), none=True)},
    ),
    DBudgetKV: (
        {},
        {"threshold": FRACTION, "sinks": ints(0), "observation": ints(1), "when": WHEN},
    ),
    FastGen: (
        {},
        {
            **dict.fromkeys(("recovery", "frequent", "local"), FRACTION),
            "sinks": ints(0),
            "observation": ints(1),
            "when": WHEN,
        },
    ),
    SimLayerKV: (
        {},
        {
            "threshold": FRACTION,
            "sinks": ints(0),
            "recent": ints(1),
            "observation": ints(1),
            "when": WHEN,
        },
    ),
    AtPromptEnd: (
        {"admission": LOCAL},
        {"admission": ADMISSION, "generated": words("admission", "keep")},
    ),
    Rope: (
        {"frequencies": (1.0,)},
        {
            "frequencies": Kind((tuple, list), lambda value: value == (1.5,)),
            "interleaved": FLAG,
            "tail": FLAG,
            "sign": Kind((int,), lambda value: value in (1, -1)),
            "factor": numbers(lambda value: value > 0),
        },
    ),
    Tokens: ({"tokens": 64}, {"tokens": ints(1)}),
    Ratio: ({"ratio": 0.5}, {"ratio": POSITIVE_FRACTION}),
    Adaptive: (
        {"base": Tokens(64)},
        {"base": BASE, "floor": FRACTION, "form": words("minimum", "window", "blend")},
    ),
    Pyramid: (
        {"base": Tokens(64)},
        {"base": BASE, "beta": numbers(lambda value: value >= 1), "observation": ints(0)},
    ),
    AcrossLayers: ({"base": Tokens(64)}, {"base": BASE, "floor": FRACTION}),
    LazyLayers: (
        {"base": Tokens(64)},
        {"base": BASE, "threshold": FRACTION, "held": ints(0)},
    ),
    HeadKV: (
        {"base": Tokens(64), "importance": ((1.0, 2.0),)},
        {
            "base": BASE,
            "importance": Kind((tuple, list), lambda value: value == ((0.5,),)),
            "beta": numbers(lambda value: value >= 1),
            "temperature": numbers(lambda value: value >= 0),
        },
    ),
    LUKV: (
        {"parts": ((0.5, 0.2),)},
        {"parts": Kind((tuple, list), lambda value: value == ((0.5,),))},
    ),
    TotalCap: ({"tokens": 64}, {"tokens": ints(1, (1 << 63) - 1), "drop": POSITIVE_FRACTION}),
    Knob: (
        {"name": "budget", "at": abs, "set": abs},
        {"name": Kind((str,)), "at": FUNCTION, "set": FUNCTION},
    ),
    PerLayerAdmission: ({"default": LOCAL, "layers": {}}, {"default": ADMISSION, "layers": EMPTY}),
    PerLayerSelection: (
        {"default": SelectAll(), "layers": {}},
        {"default": SELECTION, "layers": EMPTY},
    ),
    PerLayerEviction: (
        {"default": KeepAll(), "layers": {}},
        {"default": EVICTION, "layers": EMPTY},
    ),
}  # fmt: skip

VALUES = [
    None, True, False, -1, 0, 1, 2, MOST, MOST + 1, 10**30, 10**5000, -1.5, 0.5, 1.5, 3.0, NAN, INF,
    -INF, 1j, "", "raise", "cpu", "max", "prompt_end", "reference", "64", b"x", (), [], {}, ((),),
    (1.5,), ((0.5,),), {1}, range(3), object(), torch.ones(1, 4), torch.ones(2), torch.float32, int,
    LocalAttention, Quest, LOCAL, Quest(budget=9), SnapKV(budget=9), Tokens(9), Ratio(0.5),
    TotalCap(9), lambda value: value,
]  # fmt: skip


def public():
    found = {}
    for room in ROOMS:
        for name, value in vars(importlib.import_module(f"kvpolicy{room}")).items():
            if isinstance(value, type) and attrs.has(value) and not name.startswith("_"):
                found[value] = value.__name__
    return {kind for kind, name in found.items() if name not in MADE}


def test_every_public_class_and_field_stands_here():
    assert public() == set(CLASSES)
    for kind, (_, fields) in CLASSES.items():
        assert [f.alias for f in attrs.fields(kind) if f.init] == sorted(
            fields, key=[f.alias for f in attrs.fields(kind)].index
        )


# Fields that hold what they were given.
SCALARS = {
    "window",
    "sinks",
    "tokens",
    "sparsity",
    "seed",
    "threshold",
    "rollback",
    "scale",
    "beta",
}
CASES = [(kind, name) for kind, (_, fields) in CLASSES.items() for name in fields]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_field_takes_what_it_says_and_names_what_it_refuses(kind, name):
    arguments, fields = CLASSES[kind]
    wrong = []
    for value in VALUES:
        if name == "dtype" and value is torch.float32:
            continue
        try:
            made = kind(**arguments | {name: value})
        except (TypeError, ValueError) as error:
            wanted = TypeError if not fields[name].of_type(value) else ValueError
            # An int budget is Tokens, which names its own field.
            names = (
                f"({name}|tokens)" if name in ("budget", "base") and type(value) is int else name
            )
            says = re.match(rf"(\w+, )*{names}(, \w+)*: wanted .*, got .", str(error), re.DOTALL)
            if fields[name].takes(value) or not says or len(str(error)) > 500:
                wrong.append((shown(value), error))
            elif type(error) is not wanted and type(value) not in (type(None), tuple, range):
                wrong.append((shown(value), f"wanted {wanted.__name__}", error))
        else:
            if not fields[name].takes(value):
                wrong.append((shown(value), made))
            elif name in SCALARS and value is not None and getattr(made, name) != value:
                wrong.append((value, "is kept as", getattr(made, name)))
    assert not wrong


def test_a_budget_is_a_budget_for_fields_of_budgets():
    """So that the kinds above name all of them."""
    assert {kind for kind in CLASSES if issubclass(kind, Budget)} == set(BUDGET.types)
