"""Validators shared by the frozen classes."""

from __future__ import annotations

import math
from typing import Any

import attrs


def positive(instance: Any, attribute: attrs.Attribute, value: Any) -> None:
    """An int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name}: wanted an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{attribute.name}: wanted at least 1, got {value}")


def not_negative(instance: Any, attribute: attrs.Attribute, value: Any) -> None:
    """An int of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name}: wanted an int of at least 0, got {value!r}")
    if value < 0:
        raise ValueError(f"{attribute.name}: wanted at least 0, got {value}")


def fraction(low_open: bool = False, high_open: bool = False) -> Any:
    """A number in [0, 1], without the named ends."""
    wanted = f"a number in {'(' if low_open else '['}0, 1{')' if high_open else ']'}"

    def check(instance: Any, attribute: attrs.Attribute, value: Any) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{attribute.name}: wanted {wanted}, got {value!r}")
        low = value > 0 if low_open else value >= 0
        high = value < 1 if high_open else value <= 1
        if math.isnan(value) or not (low and high):
            raise ValueError(f"{attribute.name}: wanted {wanted}, got {value}")

    return check


def one_of(*options: Any) -> Any:
    """One of the named values."""

    def check(instance: Any, attribute: attrs.Attribute, value: Any) -> None:
        if value not in options:
            wanted = ", ".join(repr(option) for option in options)
            raise ValueError(f"{attribute.name}: wanted one of {wanted}, got {value!r}")

    return check
