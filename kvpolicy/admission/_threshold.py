"""Score and threshold: the comparison that learned admissions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exceeds(scores: Tensor, threshold: float, inclusive: bool = False) -> Tensor:
    """Whether scores are above `threshold` (`inclusive`: or equal), compared in their own dtype.

    The threshold is rounded to that dtype: in bf16, 0.1 is 0.10009765625 and equality does occur.
    """
    limit = rounded(threshold, scores.dtype)
    return scores >= limit if inclusive else scores > limit


def rounded(value: float, dtype: torch.dtype) -> float:
    """The normal number of `dtype` nearest to `value`, ties to even; touches no device."""
    mantissa, exponent = math.frexp(value)
    steps = 2 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * steps) / steps, exponent)
