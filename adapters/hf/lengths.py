"""How far a generation may go, by the arguments and criteria that say so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers.generation import GenerationConfig, MaxLengthCriteria

_BEYOND = 1 << 60  # tokens: as good as no end


def whole(length: Any) -> float:
    """The first number of columns that is no less than `length`, as transformers compares them.

    An int, or infinite: where no memory holds as many, and of what is no number.
    """
    try:
        number = float(length)
    except OverflowError:
        return math.inf
    return math.ceil(number) if abs(number) < _BEYOND else number if number < 0 else math.inf


def ends_at(criteria: Iterable[Any]) -> float:
    """The columns at which a criterion of transformers' own stops all rows; infinite without one.

    One that a call gives takes the place of that which `max_length` makes, as transformers has it.
    """
    own = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    return min(map(whole, own), default=math.inf)


def new_tokens(config: GenerationConfig, kwargs: dict[str, Any], width: int) -> float:
    """The most that a call may generate after `width` columns; transformers' default is 20."""
    criteria = kwargs.get("stopping_criteria") or ()
    if any(type(criterion) is MaxLengthCriteria for criterion in criteria):
        return max(ends_at(criteria) - width, 1)
    if config.max_new_tokens is not None:
        return whole(config.max_new_tokens)
    return max(whole(config.max_length or 0) - width, 0) or 20
