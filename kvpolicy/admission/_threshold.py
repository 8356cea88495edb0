"""The threshold as scores are compared with it."""

from __future__ import annotations

import math

import torch


def rounded(value: float, dtype: torch.dtype) -> float:
    """The normal number of `dtype` nearest to `value`, ties to even; touches no device.

    Scores meet a threshold in their own dtype: in bf16, 0.1 is 0.10009765625 and equality occurs.
    """
    mantissa, exponent = math.frexp(value)
    steps = 2 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * steps) / steps, exponent)
