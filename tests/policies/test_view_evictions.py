"""Evictions that ask for more than stored tokens, against their originals' own code.

The kept sets were recorded from NVIDIA/kvpress's presses, Zefan-Cai/R-KV's R1KV and
WeianMao/triattention's pruning_utils, run on the same sines in float64; where a press may drop the
last token, it was forced in.
"""

from __future__ import annotations

import pytest
import torch

from kvpolicy import (
    RKV,
    CriticalKV,
    ExpectedAttention,
    SnapKV,
    TriAttention,
)
from tests.support.sines import DIM, QUERY, kept

EXPECTED = [
    [0, 1, 2, 3, 4, 5, 7, 10, 12, 16, 21, 23, 25, 35, 43, 47],
    [0, 1, 2, 3, 11, 14, 18, 26, 32, 35, 36, 39, 42, 45, 46, 47],
]
WITHOUT_COVARIANCE = [
    [0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 21, 23, 25, 35, 43, 47],
    [0, 1, 2, 3, 11, 14, 18, 26, 32, 35, 36, 39, 42, 45, 46, 47],
]
WITHOUT_VALUES = [
    [0, 1, 2, 3, 5, 11, 12, 22, 25, 26, 31, 34, 36, 42, 45, 47],
    [0, 1, 2, 3, 7, 8, 11, 15, 16, 21, 26, 30, 31, 39, 40, 47],
]
OTHER_OPTIONS = [
    [0, 1, 5, 7, 11, 15, 16, 25, 30, 34, 35, 36, 40, 41, 45, 47],
    [0, 1, 2, 6, 15, 16, 20, 21, 26, 30, 31, 39, 40, 44, 45, 47],
]
CRITICAL = [
    [0, 1, 2, 3, 4, 5, 7, 10, 21, 25, 27, 34, 35, 38, 43, 47],
    [0, 1, 2, 3, 11, 14, 15, 18, 21, 29, 35, 36, 40, 42, 46, 47],
]
CRITICAL_MORE = [
    [0, 1, 2, 3, 5, 7, 11, 21, 25, 26, 34, 35, 36, 42, 43, 47],
    [0, 1, 2, 3, 7, 14, 15, 21, 26, 30, 35, 36, 39, 40, 42, 47],
]
CRITICAL_SNAP = [
    [0, 1, 5, 6, 7, 10, 11, 12, 30, 31, 42, 43, 44, 45, 46, 47],
    [6, 7, 8, 10, 24, 25, 26, 29, 30, 31, 42, 43, 44, 45, 46, 47],
]
SNAP = [
    [0, 1, 5, 6, 10, 11, 12, 29, 30, 31, 42, 43, 44, 45, 46, 47],
    [6, 7, 8, 9, 10, 24, 25, 26, 30, 31, 42, 43, 44, 45, 46, 47],
]
R_KV = [
    [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14, 26, 29, 32, *range(40, 48)],
    [4, 5, 6, 7, 8, 9, 10, 23, 26, 27, 28, 29, 30, 31, 32, 33, *range(40, 48)],
]
R_KV_OTHER = [
    [1, 2, 3, 10, 11, 12, 15, 16, 17, 25, 26, 27, 29, 30, 31, 32, 33, 39, 40, 41, *range(44, 48)],
    [4, 6, 8, 9, 10, 11, 15, 16, 17, 24, 25, 26, 27, 29, 30, 31, 32, 38, 39, 40, *range(44, 48)],
]
TRI = [
    [0, 1, 2, 6, 11, 16, 20, 25, 26, 30, 31, 35, 39, 40, 45, 47],
    [1, 6, 10, 11, 15, 16, 21, 25, 26, 30, 31, 39, 40, 44, 45, 47],
]
HELD = 16


def critical(first, inner=None):
    inner = inner or ExpectedAttention(budget=HELD, value_norm=False)
    return CriticalKV(inner, first=first)


def tri(**options):
    """Statistics of the sines themselves."""
    q = torch.complex(QUERY[..., : DIM // 2], QUERY[..., DIM // 2 :])
    mean = q.mean(1)[None]
    parts = {"real": mean.real, "imaginary": mean.imag, "size": q.abs().mean(1)[None]}
    return TriAttention(**{"budget": HELD, "when": "prompt_end"} | parts | options)


@pytest.mark.parametrize("cuts", [1, 5])
@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (ExpectedAttention(budget=HELD), EXPECTED),
        (ExpectedAttention(budget=HELD, covariance=False), WITHOUT_COVARIANCE),
        (ExpectedAttention(budget=HELD, value_norm=False), WITHOUT_VALUES),
        (ExpectedAttention(budget=HELD, epsilon=0.02, sinks=2, future=7), OTHER_OPTIONS),
        (critical(0.5), CRITICAL),
        (critical(0.75), CRITICAL_MORE),
        (critical(0.75, SnapKV(budget=HELD, observation=6, kernel=3)), CRITICAL_SNAP),
        (critical(1.0, SnapKV(budget=HELD, observation=6, kernel=3)), SNAP),
        (RKV(budget=24, when="prompt_end"), R_KV),
        (RKV(budget=24, when="prompt_end", observation=4, mix=0.5, kernel=3), R_KV_OTHER),
    ],
    ids=repr,
)
def test_the_prompt_is_kept_as_the_original_does(policy, wanted, cuts):
    assert kept(policy, cuts=cuts) == wanted


def test_triattention():
    assert kept(tri(), window=1) == TRI
    assert kept(tri(keep_prompt=True, budget=20, when="decode"), window=1, prompt=30) != TRI
