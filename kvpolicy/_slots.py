"""The three policies of a pipeline, and what to write where something else was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._fields import is_a
from .admission import Admission
from .eviction import Eviction
from .selection import Selection

SLOTS = {"admission": Admission, "selection": Selection, "eviction": Eviction}


def instead(value: Any) -> str:
    """The argument that takes a policy, which was given to another one."""
    found = [name for name, kind in SLOTS.items() if isinstance(value, kind)]
    return f"{found[0]}={type(value).__name__}(...)" if found else ""


def _classes(kind: type) -> Iterator[type]:
    own: list[type] = kind.__subclasses__()
    for found in own:
        yield found
        yield from _classes(found)


def slot_field(name: str) -> Any:
    """One policy; a name, and a list of one, say what to write."""
    kind, article = SLOTS[name], "a" if name == "selection" else "an"

    def fits(value: Any) -> str:
        if isinstance(value, str):
            titles = (x.__name__ for x in _classes(kind))
            return next((f"{x}(...)" for x in titles if x.lower() == value.lower()), "")
        if isinstance(value, list | tuple) and value and all(isinstance(x, kind) for x in value):
            if len(value) > 1:
                return "any_of(...) or all_of(...)" if name == "admission" else ""
            return f"{name}={type(value[0]).__name__}(...)"
        if isinstance(value, dict):  # of a file
            return '{"type": ..., ...}'
        return instead(value)

    return is_a(kind, f"{article} {name}", fits)
