"""What fields of the frozen classes take; the same checks serve plain arguments.

Every message is "name: wanted X, got Y", with what to write instead where that can be known: a
TypeError for a value of another kind, a ValueError for one out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]

MOST = 1 << 30  # tokens of a sequence: what a stored position can count
MOST_INT = (1 << 63) - 1  # bytes and sums over heads


def shown(value: Any) -> str:
    """A value as messages show it: short, and without a tensor's contents."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"an {type(value).__name__} of more digits than can be shown"
    if "\n" in text:  # a config, or inputs of a tokenizer
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def check_int(name: str | None, value: Any, least: int, most: int = MOST) -> None:
    """Raises unless `value` is an int from `least` to `most`; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        read = _read(value)
        whole = isinstance(read, float) and read.is_integer() and least <= read <= most
        instead = f"; write {int(read)}" if whole else ""
        raise TypeError(f"{name}: wanted an int of at least {least}, got {shown(value)}{instead}")
    if value < least:
        raise ValueError(f"{name}: wanted at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name}: wanted at most {most:,}, got {shown(value)}")


def _read(value: Any) -> Any:
    """A number that is written as a text, as a float; else `value` itself."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_number(name: str | None, value: Any, wanted: str, fits: Callable[[float], bool]) -> None:
    """Raises unless `value` is a finite int or float that `fits`; a bool is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        read = _read(value)
        does = isinstance(read, float) and math.isfinite(read) and fits(read)
        instead = f"; write {read:g}" if does else ""
        raise TypeError(f"{name}: wanted {wanted}, got {shown(value)}{instead}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not fits(number):
        percent = "0, 1" in wanted and 5 <= number <= 100 and fits(number / 100)
        instead = f"; write {number / 100:g} for {number:g} %" if percent else ""
        raise ValueError(f"{name}: wanted {wanted}, got {shown(value)}{instead}")


def integer(least: int, most: int = MOST) -> Check:
    """An int from `least` to `most`."""

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        check_int(attribute.alias, value, least, most)

    return check


positive = integer(1)
not_negative = integer(0)
seed = integer(-MOST_INT - 1, MOST_INT)


def optional(check: Check) -> Check:
    """None, or what `check` takes."""

    def checked(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is not None:
            check(instance, attribute, value)

    return checked


def odd(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """An odd int of at least 1."""
    check_int(attribute.alias, value, 1)
    if value % 2 == 0:
        raise ValueError(f"{attribute.alias}: wanted an odd number, got {value}; write {value + 1}")


def number(wanted: str, fits: Callable[[float], bool]) -> Check:
    """A finite number that `fits`, which `wanted` says in words."""

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        check_number(attribute.alias, value, wanted, fits)

    return check


def fraction(low_open: bool = False, high_open: bool = False) -> Check:
    """A number in [0, 1], without the named ends."""
    wanted = f"a number in {'(' if low_open else '['}0, 1{')' if high_open else ']'}"

    def fits(value: float) -> bool:
        return (value > 0 if low_open else value >= 0) and (value < 1 if high_open else value <= 1)

    return number(wanted, fits)


def one_of(*options: str) -> Check:
    """One of the named words."""
    wanted = "one of " + ", ".join(repr(option) for option in options)

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{attribute.alias}: wanted {wanted}, got {shown(value)}")
        if value not in options:
            raise ValueError(f"{attribute.alias}: wanted {wanted}, got {shown(value)}")

    return check


def is_a(kind: type, wanted: str, instead: Callable[[Any], str] = lambda value: "") -> Check:
    """An instance of `kind`, which `wanted` says in words.

    `instead` gives what to write in place of a wrong value, or "".
    """

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if isinstance(value, kind):
            return
        is_class = isinstance(value, type) and issubclass(value, kind)
        hint = f"{value.__name__}(...)" if is_class else instead(value)
        raise TypeError(
            f"{attribute.alias}: wanted {wanted}, got {shown(value)}"
            + (f"; write {hint}" if hint else "")
        )

    return check


flag = is_a(bool, "a bool")
function = is_a(Callable, "a function")  # type: ignore[arg-type]


def check_floats(instance: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for the first of these fields that is no tensor of floats of its shape."""
    for name, shape in shapes.items():
        found: Tensor = getattr(instance, name)
        if found.shape != shape or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"{name}: wanted floats {list(shape)}, got {got}")
