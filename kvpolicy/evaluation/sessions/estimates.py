"""Means over contexts with their standard errors, and quotients of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import attrs


@attrs.frozen(kw_only=True)
class Estimate:
    """A mean over contexts with its standard error (NaN for one context)."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over contexts and its standard error."""
    if not values:
        return Estimate(mean=math.nan, standard_error=math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(mean=statistics.fmean(values), standard_error=spread / math.sqrt(len(values)))


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """The quotient of two means over the same contexts, with the error of leaving one out."""
    count = len(values)
    if count != len(base) or not sum(base):
        return Estimate(mean=math.nan, standard_error=math.nan)
    total, below = sum(values), sum(base)
    left = [(total - a) / (below - b) for a, b in zip(values, base, strict=True) if below - b]
    error = math.nan
    if len(left) == count > 1:
        middle = statistics.fmean(left)
        error = math.sqrt((count - 1) / count * sum((x - middle) ** 2 for x in left))
    return Estimate(mean=total / below, standard_error=error)


def shown(values: Sequence[float]) -> str:
    """Mean and standard error, as far as there are any."""
    return said(estimate(values))


def said(found: Estimate) -> str:
    """An estimate, as far as there is one."""
    if math.isnan(found.standard_error):
        return "" if math.isnan(found.mean) else f"{found.mean:.3f}"
    return str(found)
