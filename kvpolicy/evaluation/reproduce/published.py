"""What WG-KV published: numbers of its figures 7 to 10 and the settings they were made with.

Source: the figures' data (lashhw/WG-KV-figures @0e1fa86, `data/*.csv`), the README of
EMCLab-Sinica/WG-KV and arXiv 2512.17452v3. Means over HELMET's tasks are this project's arithmetic
on these data: of each task's score over full attention's.
"""

from __future__ import annotations

from ..chart import Point

BY = "WG-KV, published"
LLAMA, THINKING = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-4B-Thinking-2507"
WINDOW = 256

LAMBDAS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
# (mean KV size, mean of score / full), 14 tasks of HELMET at 32K; baselines below .2: 13 tasks.
_WGKV = (
    (0.761, 0.996), (0.635, 0.994), (0.496, 0.994), (0.358, 0.994), (0.243, 1.005), (0.161, 0.998),
    (0.107, 0.974), (0.068, 0.894), (0.041, 0.760),
)  # fmt: skip
_DUO = (
    (0.904, 0.996), (0.807, 0.990), (0.706, 0.959), (0.609, 0.942), (0.509, 0.930), (0.412, 0.861),
    (0.312, 0.766), (0.215, 0.607),
)  # fmt: skip
_LOCAL = (
    (0.906, 0.957), (0.806, 0.938), (0.706, 0.896), (0.606, 0.866), (0.506, 0.837), (0.406, 0.791),
)  # fmt: skip

QUEST_LAMBDA, QUEST_BUDGETS = 0.08, (320, 512, 1024, 2048, 4096, 8192)
# Mean of score / full over the tasks, by budget.
_QUEST = (0.653, 0.847, 0.919, 0.959, 0.976, 0.992)
_GATE_QUEST = (0.645, 0.851, 0.939, 0.977, 0.994, 0.995)

REASON_LAMBDAS = (0.08, 0.16, 0.32, 0.64, 1.28)
CAP, DROP = 4096, 0.1  # tokens a head, window included; part that a round evicts
# AIME25's 30 problems, one sample each: tokens per head and the part that is right.
_CAPPED = ((4036, 0.6667), (3804, 0.7667), (3289, 0.8), (2627, 0.7333), (1735, 0.6667))
_FREE = ((9070, 0.8), (6010, 0.8667), (4270, 0.8), (2696, 0.7667), (1735, 0.6667))
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NEW_TOKENS = 81_920

SYSTEM_LAMBDA, STEPS = 0.16, 300
LENGTHS = (100_000, 200_000, 300_000, 400_000, 500_000)
# Seconds to the first token, ms a token, MiB / 1000 of weights and cache; full runs out at 500K.
_FULL = ((12.40, 58.3, 27.86), (44.89, 86.4, 40.37), (97.45, 114.8, 52.87), (170.42, 142.8, 65.38))
_GATED = (
    (4.83, 36.2, 17.89), (13.59, 42.3, 20.53), (26.28, 47.6, 23.12), (43.90, 54.7, 25.90),
    (65.28, 60.9, 28.98),
)  # fmt: skip
SYSTEM = ("seconds to the first token", "ms a token", "MiB / 1000 of weights and cache")


def accuracy() -> list[Point]:
    """Figure 7: part of full attention's score over the part of the cache."""
    rows = [("write gate", f"lambda {x:g}", *at) for x, at in zip(LAMBDAS, _WGKV, strict=True)]
    rows += [("DuoAttention", f"{x:.0%} held", x, y) for x, y in _DUO]
    rows += [("local", f"{x:.0%} held", x, y) for x, y in _LOCAL]
    return [Point(curve=c, name=n, x=x, y=y, by=BY) for c, n, x, y in [_full(1.0), *rows]]


def selection() -> list[Point]:
    """Figure 9: part of full attention's score over the tokens that a decoded token reads."""
    pairs = (("Quest", _QUEST), ("gate + Quest", _GATE_QUEST))
    return [
        Point(curve=name, name=f"budget {x}", x=x, y=y, by=BY)
        for name, values in pairs
        for x, y in zip(QUEST_BUDGETS, values, strict=True)
    ]


def reasoning() -> list[Point]:
    """Figure 10: AIME25's accuracy over the tokens that a head holds."""
    rows = [("full", "unbounded", 22_028, 0.8), ("SnapKV", f"cap {CAP}", 4112, 0.2667)]
    for curve, found in (("gate + SnapKV", _CAPPED), ("write gate", _FREE)):
        rows += [(curve, f"lambda {x:g}", *at) for x, at in zip(REASON_LAMBDAS, found, strict=True)]
    return [Point(curve=c, name=n, x=x, y=y, by=BY) for c, n, x, y in rows]


def system(which: int) -> list[Point]:
    """Figure 8: one of `SYSTEM` over the prompt's tokens."""
    return [
        Point(curve=curve, name=f"{length // 1000}K", x=length, y=row[which], by=BY)
        for curve, rows in (("full", _FULL), ("write gate", _GATED))
        for length, row in zip(LENGTHS, rows, strict=False)
    ]


def _full(value: float) -> tuple[str, str, float, float]:
    return "full", "full attention", 1.0, value
